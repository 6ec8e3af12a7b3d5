/** The files of a drop, those in directories too, at most a few levels deep. */

import type { Found } from "./files.ts"

const MOST_LEVELS = 4
const MOST_FILES = 5000

/** Must be called while the drop event runs: its items are gone afterwards. */
export function entriesOf(transfer: DataTransfer): (FileSystemEntry | File)[] {
  const items = [...transfer.items].filter((item) => item.kind === "file")
  return items.map((item) => item.webkitGetAsEntry() ?? item.getAsFile()).filter((entry) => entry !== null)
}

/** `whole`: there were no more files, and no deeper ones. */
interface Dropped {
  found: Found[]
  whole: boolean
}

export async function filesOf(entries: readonly (FileSystemEntry | File)[]): Promise<Dropped> {
  const dropped: Dropped = { found: [], whole: true }
  for (const entry of entries) {
    if (entry instanceof File) dropped.found.push({ path: entry.name, file: entry })
    else await walk(entry, "", 0, dropped)
  }
  return dropped
}

async function walk(entry: FileSystemEntry, above: string, level: number, dropped: Dropped): Promise<void> {
  if (dropped.found.length >= MOST_FILES || level > MOST_LEVELS) {
    dropped.whole = false
    return
  }
  const path = above + entry.name
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => {
      ;(entry as FileSystemFileEntry).file(resolve, reject)
    })
    dropped.found.push({ path, file })
  } else {
    for (const child of await children(entry as FileSystemDirectoryEntry)) {
      await walk(child, `${path}/`, level + 1, dropped)
    }
  }
}

/** A reader gives at most a hundred at a time, and none when it is done. */
async function children(directory: FileSystemDirectoryEntry): Promise<FileSystemEntry[]> {
  const reader = directory.createReader()
  const all: FileSystemEntry[] = []
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => {
      reader.readEntries(resolve, reject)
    })
    if (some.length === 0) return all
    all.push(...some)
  }
}

/** Of a file picker; one for directories says where each file lay. */
export const pickedFiles = (input: HTMLInputElement): Found[] =>
  [...(input.files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }))

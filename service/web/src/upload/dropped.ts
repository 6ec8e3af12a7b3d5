/** The files of a drop, those in directories too, at most a few levels deep. */

import type { Found } from "./files.ts"

const MOST_LEVELS = 4
const MOST_FILES = 5000

/** Must be called while the drop event runs: its items are gone afterwards. */
export function entriesOf(transfer: DataTransfer): (FileSystemEntry | File)[] {
  const items = [...transfer.items].filter((item) => item.kind === "file")
  return items.map((item) => item.webkitGetAsEntry() ?? item.getAsFile()).filter((entry) => entry !== null)
}

export async function filesOf(entries: readonly (FileSystemEntry | File)[]): Promise<Found[]> {
  const found: Found[] = []
  for (const entry of entries) {
    if (entry instanceof File) found.push({ path: entry.name, file: entry })
    else await walk(entry, "", 0, found)
  }
  return found
}

async function walk(entry: FileSystemEntry, above: string, level: number, found: Found[]): Promise<void> {
  if (found.length >= MOST_FILES) return
  const path = above + entry.name
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => {
      ;(entry as FileSystemFileEntry).file(resolve, reject)
    })
    found.push({ path, file })
  } else if (level < MOST_LEVELS) {
    for (const child of await children(entry as FileSystemDirectoryEntry)) {
      await walk(child, `${path}/`, level + 1, found)
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

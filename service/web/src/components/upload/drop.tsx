/** Files dropped anywhere on the view become uploads; meanwhile it says so. */

import { signal } from "@preact/signals"
import { useEffect } from "preact/hooks"
import { whyNoChange } from "../../rights.ts"
import { notify, report } from "../../state.ts"
import { entriesOf, filesOf } from "../../upload/dropped.ts"
import { add } from "../../upload/queue.ts"

const over = signal(false)

export function DropZone() {
  useEffect(() => {
    let depth = 0 // entering a child comes before leaving its parent
    const watch = (event: DragEvent) => {
      if (!event.dataTransfer?.types.includes("Files")) return
      event.preventDefault() // the browser would open the file in place of the page
      if (event.type === "dragenter") depth += 1
      if (event.type === "dragleave") depth -= 1
      if (event.type === "drop") {
        depth = 0
        if (whyNoChange() === null) void take(event.dataTransfer)
      }
      if (event.type === "dragover") event.dataTransfer.dropEffect = whyNoChange() === null ? "copy" : "none"
      over.value = depth > 0
    }
    const events = ["dragenter", "dragover", "dragleave", "drop"] as const
    events.forEach((name) => addEventListener(name, watch))
    return () => {
      events.forEach((name) => removeEventListener(name, watch))
      over.value = false
    }
  }, [])
  if (!over.value) return null
  return (
    <div class="drop" aria-hidden="true">
      <p class="card">{whyNoChange() ?? "Drop adapter directories or their files"}</p>
    </div>
  )
}

async function take(transfer: DataTransfer): Promise<void> {
  try {
    const { found, whole } = await filesOf(entriesOf(transfer))
    if (!whole) {
      notify("error", "Not all of it was looked at: drop the adapters' own directories, or fewer at a time.")
    } else if (found.length === 0) {
      notify("error", "There are no files in what was dropped.")
    }
    if (found.length === 0) return
    add(found)
    // One may have scrolled far down when dropping.
    requestAnimationFrame(() => document.querySelector("section.upload")?.scrollIntoView())
  } catch (error) {
    report(error) // a file that cannot be read
  }
}

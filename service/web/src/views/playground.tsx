/** One prompt, several adapters: their answers side by side, as they come. */

import { useEffect } from "preact/hooks"
import { Ask } from "../components/play/ask.tsx"
import { ColumnCard } from "../components/play/column.tsx"
import { Summary } from "../components/play/summary.tsx"
import { adapters, mayInfer, place } from "../state.ts"
import { forget, run, running, stop } from "../play/run.ts"
import { fillIn, openLinked, setup } from "../play/state.ts"
import "./playground.css"

const LETTERS = "ABCDEF"

export function Playground() {
  const linked = place.value.name
  useEffect(() => {
    if (linked === null) return
    forget()
    openLinked(linked)
  }, [linked])
  useEffect(fillIn, [adapters.value])
  useEffect(() => {
    addEventListener("keydown", onKeyDown)
    return () => {
      removeEventListener("keydown", onKeyDown)
      stop() // nobody sees the answers any more
    }
  }, [])
  return (
    <>
      <h1>Playground</h1>
      <Ask />
      <Summary />
      <div class="play-columns">
        {setup.value.columns.map((column, i) => (
          <ColumnCard key={column.id} column={column} letter={LETTERS[i] ?? "?"} />
        ))}
      </div>
    </>
  )
}

/** Wherever the focus is. A list or dialog that takes Escape for itself prevents its default. */
function onKeyDown(event: KeyboardEvent): void {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault()
    if (mayInfer.value) void run()
  }
  if (event.key === "Escape" && running.value) {
    event.preventDefault()
    stop()
  }
}

/** Asks before what cannot be undone. A refusal of the server's stays in the dialog, word for word. */

import { signal } from "@preact/signals"
import { useEffect, useRef } from "preact/hooks"
import { notify } from "../state.ts"

interface Question {
  title: string
  text: string
  yes: string
  danger?: boolean
  act: () => Promise<void>
}

export const question = signal<Question | null>(null)
const working = signal(false)
const refused = signal<string | null>(null)

export function ConfirmDialog() {
  const dialog = useRef<HTMLDialogElement>(null)
  const asked = question.value

  useEffect(() => {
    if (asked && !dialog.current?.open) dialog.current?.showModal()
    if (!asked && dialog.current?.open) dialog.current.close()
    refused.value = null
  }, [asked])

  return (
    <dialog
      ref={dialog}
      class="card confirm"
      aria-labelledby="confirm-title"
      aria-describedby="confirm-text"
      onClose={closed}
    >
      <h2 id="confirm-title">{asked?.title}</h2>
      <p id="confirm-text">{asked?.text}</p>
      {refused.value !== null && (
        <p class="refusal" role="alert">
          {refused.value}
        </p>
      )}
      <div class="row end">
        <button type="button" onClick={() => dialog.current?.close()} autofocus>
          Cancel
        </button>
        <button
          type="button"
          class={asked?.danger ? "danger" : "primary"}
          disabled={working.value}
          onClick={() => asked && void answer(asked)}
        >
          {asked?.yes}
        </button>
      </div>
    </dialog>
  )
}

/** The browser gives the focus back to where it was; that may have been deleted meanwhile. */
function closed(): void {
  question.value = null
  if (document.activeElement === document.body) document.getElementById("main")?.focus()
}

async function answer(asked: Question): Promise<void> {
  working.value = true
  refused.value = null
  try {
    await asked.act()
    if (question.value === asked) question.value = null
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error)
    // Whoever closed the dialog meanwhile, and perhaps asked for something else, is told aside.
    if (question.value === asked) refused.value = message
    else notify("error", message)
  } finally {
    working.value = false
  }
}

/** Saves a blend as an adapter of its own. */

import { useState } from "preact/hooks"
import { client, loadAdapters, mayChange, notify, report } from "../../state.ts"
import { said } from "../../play/run.ts"
import { lackOf } from "../../play/setup.ts"
import type { Column } from "../../play/setup.ts"
import { change } from "../../play/state.ts"

export function Save({ column, title }: { column: Column; title: string }) {
  const [open, setOpen] = useState(false)
  const [name, setName] = useState("")
  const [saving, setSaving] = useState(false)
  const [refusal, setRefusal] = useState<string | null>(null)

  const submit = async (event: Event) => {
    event.preventDefault()
    setSaving(true)
    setRefusal(null)
    try {
      const saved = await client.value.blend(name.trim(), column.blend)
      notify("done", `The blend is saved as ${saved.name}.`)
      change(column.id, { kind: "one", name: saved.name })
      loadAdapters().catch(report)
    } catch (error) {
      setRefusal(said(error).message)
    } finally {
      setSaving(false)
    }
  }
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key !== "Escape") return
    event.preventDefault() // it closes the form, and does not stop the run
    setOpen(false)
  }
  const why = mayChange.value ? (lackOf(column) ?? undefined) : "This key may not change adapters."
  if (!open) {
    return (
      <button
        type="button"
        class="small"
        disabled={why !== undefined}
        title={why}
        onClick={() => setOpen(true)}
      >
        Save as an adapter…
      </button>
    )
  }
  return (
    <form class="blend-save" onSubmit={submit} onKeyDown={onKeyDown}>
      <input
        ref={focused}
        aria-label={`Name to save ${title} under`}
        placeholder="Its name"
        autocomplete="off"
        spellcheck={false}
        required
        value={name}
        onInput={(event) => setName(event.currentTarget.value)}
      />
      <button type="submit" disabled={saving || why !== undefined} title={why}>
        {saving ? "Saving…" : "Save"}
      </button>
      {refusal !== null && (
        <p class="refusal" role="alert">
          {refusal}
        </p>
      )}
    </form>
  )
}

/** The form was asked for by a click or a key: what is typed next is the name. */
function focused(input: HTMLInputElement | null): void {
  input?.focus()
}

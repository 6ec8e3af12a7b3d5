/** Asks for an API key when the server wants one. */

import { useEffect, useRef } from "preact/hooks"
import { apiKey, connect, keyRefused, useKey } from "../state.ts"
import { keyDialogOpen } from "./header.tsx"

/** What may stand in a header. Anything else the browser would refuse to send, as if there were no server. */
const SENDABLE = /^[\x21-\x7e]*$/

export function KeyDialog() {
  const dialog = useRef<HTMLDialogElement>(null)
  const input = useRef<HTMLInputElement>(null)
  const open = keyDialogOpen.value || keyRefused.value !== null

  useEffect(() => {
    if (open && !dialog.current?.open) dialog.current?.showModal()
    if (!open && dialog.current?.open) dialog.current.close()
    if (input.current) input.current.value = "" // a key that was forgotten would still stand there
  }, [open])

  const submit = async (event: Event) => {
    event.preventDefault()
    const key = input.current?.value.trim() ?? ""
    if (!SENDABLE.test(key)) {
      keyRefused.value =
        "That is no key: it has letters that no key has. Was all of it copied, and nothing else?"
      return
    }
    useKey(key === "" ? null : key)
    keyDialogOpen.value = false
    await connect()
  }
  return (
    <dialog ref={dialog} class="card" onCancel={() => close()} aria-labelledby="key-title">
      <form onSubmit={submit}>
        <h2 id="key-title">API key</h2>
        {keyRefused.value !== null && <p class="refusal">{keyRefused.value}</p>}
        <label>
          Key
          <input ref={input} type="password" autocomplete="off" spellcheck={false} name="key" />
        </label>
        <p class="faint">It is kept in this tab alone, and forgotten when the tab closes.</p>
        <div class="row end">
          {apiKey.value !== null && (
            <button type="button" class="quiet" onClick={() => forget()}>
              Forget it
            </button>
          )}
          <button type="button" class="quiet" onClick={close}>
            Cancel
          </button>
          <button type="submit" class="primary">
            Use
          </button>
        </div>
      </form>
    </dialog>
  )
}

function close(): void {
  keyDialogOpen.value = false
  keyRefused.value = null
}

function forget(): void {
  useKey(null)
  keyDialogOpen.value = false
  void connect()
}

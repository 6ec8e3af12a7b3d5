/** An adapter that the server fetches itself: from a directory on its disk, or from the Hub. */

import { useState } from "preact/hooks"
import { ApiError } from "../../api.ts"
import type { Adapter } from "../../api.ts"
import { client, loadAdapters, notify } from "../../state.ts"
import { nameFault, nameFrom } from "../../upload/files.ts"
import { uploadPath } from "../../upload/form.ts"
import type { Options } from "../../upload/form.ts"
import { Refusal } from "./job.tsx"
import { OptionFields } from "./options.tsx"

const NEW: Options = { name: "", replace: false, mismatch: false, activate: "" }

export function SourceForm() {
  const [source, setSource] = useState("")
  const [options, setOptions] = useState(NEW)
  const [refused, setRefused] = useState<ApiError | null>(null)
  const [working, setWorking] = useState(false)

  const typed = (text: string) => {
    const before = suggested(source)
    setSource(text)
    // The name follows the source until it is changed by hand.
    if (options.name === before) setOptions({ ...options, name: suggested(text) })
  }
  const submit = async (event: Event) => {
    event.preventDefault()
    setWorking(true)
    setRefused(null)
    try {
      const stored = await register(source.trim(), options)
      notify("done", `${stored.name} was registered.`)
      setSource("")
      setOptions(NEW)
      await loadAdapters()
    } catch (error) {
      setRefused(error instanceof ApiError ? error : new ApiError(0, "unknown", String(error), null, null))
    } finally {
      setWorking(false)
    }
  }
  return (
    <form class="job" onSubmit={submit} aria-label="Register from a source" noValidate>
      <div class="field whole">
        <label>
          Source
          <input
            type="text"
            value={source}
            disabled={working}
            spellcheck={false}
            autocomplete="off"
            placeholder="hf://org/repo@revision or /path/on/the/server"
            aria-describedby="source-meaning"
            onInput={(event) => typed(event.currentTarget.value)}
          />
        </label>
        <span id="source-meaning" class="hint">
          The server must have been started with an --allow-source that covers it.
        </span>
      </div>
      <OptionFields
        id="source"
        options={options}
        disabled={working}
        change={(changes) => setOptions({ ...options, ...changes })}
      />
      {refused && <Refusal code={refused.code} message={refused.message} />}
      {working && <p role="status">The server fetches and checks it.</p>}
      <div class="row end">
        <button
          type="submit"
          class="primary"
          disabled={working || source.trim() === "" || nameFault(options.name) !== null}
        >
          Register
        </button>
      </div>
    </form>
  )
}

/** The last part of a path, or a repository's name without its revision. */
function suggested(source: string): string {
  const path = source.trim().replace(/\/+$/, "")
  return nameFrom(path.slice(path.lastIndexOf("/") + 1).replace(/@[^/]*$/, ""))
}

function register(source: string, options: Options): Promise<Adapter> {
  const body = { name: options.name, source, activate: options.activate || false }
  return client.value.json<Adapter>("POST", uploadPath(options), body)
}

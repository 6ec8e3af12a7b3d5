/** Adding adapters: from files of one's own, or from where the server fetches them itself. */

import { useRef, useState } from "preact/hooks"
import { pickedFiles } from "../../upload/dropped.ts"
import { add, isReady, jobs, panelOpen, start } from "../../upload/queue.ts"
import { JobForm } from "./job.tsx"
import { SourceForm } from "./source.tsx"

export function UploadPanel() {
  const [fromSource, setFromSource] = useState(false)
  if (!panelOpen.value) return null
  return (
    <section class="card upload" aria-labelledby="upload-title">
      <div class="row spread">
        <h2 id="upload-title">Add an adapter</h2>
        <button type="button" class="quiet" aria-label="Close" onClick={() => (panelOpen.value = false)}>
          ×
        </button>
      </div>
      <fieldset class="choice">
        <legend class="hidden">Where it is</legend>
        <label>
          <input type="radio" name="from" checked={!fromSource} onChange={() => setFromSource(false)} />
          Files on this computer
        </label>
        <label>
          <input type="radio" name="from" checked={fromSource} onChange={() => setFromSource(true)} />A
          directory of the server, or the Hub
        </label>
      </fieldset>
      {fromSource ? <SourceForm /> : <FromFiles />}
    </section>
  )
}

function FromFiles() {
  const ready = jobs.value.filter(isReady)
  const finished = jobs.value.some(({ progress }) => progress.at === "stored")
  return (
    <>
      <Pickers />
      {jobs.value.map((job) => (
        <JobForm key={job.id} job={job} />
      ))}
      {jobs.value.length > 1 && (
        <div class="row end all">
          {finished && (
            <button type="button" class="quiet" onClick={clear}>
              Clear those that are stored
            </button>
          )}
          <button
            type="button"
            class="primary"
            disabled={ready.length === 0}
            onClick={() => start(ready.map(({ id }) => id))}
          >
            Upload all ({ready.length})
          </button>
        </div>
      )}
    </>
  )
}

function clear(): void {
  jobs.value = jobs.value.filter(({ progress }) => progress.at !== "stored")
}

function Pickers() {
  const directory = useRef<HTMLInputElement>(null)
  const files = useRef<HTMLInputElement>(null)
  const take = (input: HTMLInputElement) => {
    add(pickedFiles(input))
    input.value = "" // so that the same can be chosen again
  }
  return (
    <div class="pickers">
      <p>
        Drop directories or files anywhere on this page, or{" "}
        <button type="button" onClick={() => directory.current?.click()}>
          Choose a directory
        </button>{" "}
        <button type="button" onClick={() => files.current?.click()}>
          Choose files
        </button>
      </p>
      <p class="faint">
        An adapter is <code>adapter_config.json</code> and <code>adapter_model.safetensors</code>, as PEFT
        saves them; <code>tokenizer_config.json</code>, <code>chat_template.jinja</code> and{" "}
        <code>labels.json</code> come along.
      </p>
      <input
        ref={(input) => {
          directory.current = input
          if (input) input.webkitdirectory = true
        }}
        class="hidden"
        type="file"
        tabIndex={-1}
        aria-label="A directory"
        onChange={(event) => take(event.currentTarget)}
      />
      <input
        ref={files}
        class="hidden"
        type="file"
        multiple
        tabIndex={-1}
        aria-label="Files"
        onChange={(event) => take(event.currentTarget)}
      />
    </div>
  )
}

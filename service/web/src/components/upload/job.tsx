/** One adapter on its way to the server: what it is called, its files, and how far it is. */

import { bytes } from "../../format.ts"
import { PARTS, missing } from "../../upload/files.ts"
import type { Part } from "../../upload/files.ts"
import { cancel, change, isEditable, isReady, jobs, remove, start } from "../../upload/queue.ts"
import type { Job } from "../../upload/queue.ts"
import { OptionFields } from "./options.tsx"

export function JobForm({ job }: { job: Job }) {
  const editable = isEditable(job)
  const submit = (event: Event) => {
    event.preventDefault()
    if (isReady(job)) start([job.id])
  }
  return (
    <form class="job" onSubmit={submit} aria-label={`Upload ${job.name}`} noValidate>
      <OptionFields
        id={`job-${job.id}`}
        options={job}
        disabled={!editable}
        change={(changes) => change(job.id, changes)}
      />
      <FileList job={job} />
      <Status job={job} />
      <div class="row end">
        {job.progress.at !== "sending" && job.progress.at !== "checking" && job.progress.at !== "waiting" && (
          <button type="button" class="quiet" onClick={() => remove(job.id)}>
            {job.progress.at === "stored" ? "Dismiss" : "Remove"}
          </button>
        )}
        {/* By key: were it one element, the click that cancels would find it a submit button in the end. */}
        {editable ? (
          <button
            key="upload"
            type="submit"
            class={jobs.value.length === 1 ? "primary" : ""}
            disabled={!isReady(job)}
          >
            {job.progress.at === "refused" ? "Try again" : "Upload"}
          </button>
        ) : (
          job.progress.at !== "stored" && (
            <button key="cancel" type="button" onClick={() => cancel(job.id)}>
              Cancel
            </button>
          )
        )}
      </div>
    </form>
  )
}

function FileList({ job: { files, others } }: { job: Job }) {
  const lacking = missing(files)
  return (
    <ul class="files">
      {(Object.keys(PARTS) as Part[]).map((part) => {
        const file = files[part]
        return file ? (
          <li key={part}>
            <code>{PARTS[part]}</code> <span class="faint">{bytes(file.size)}</span>
          </li>
        ) : null
      })}
      {lacking.map((name) => (
        <li key={name} class="bad">
          <code>{name}</code> is missing
        </li>
      ))}
      {others.length > 0 && (
        <li class="faint" title={others.join("\n")}>
          {others.length === 1 ? "1 other file is" : `${others.length} other files are`} not sent
        </li>
      )}
    </ul>
  )
}

function Status({ job: { progress } }: { job: Job }) {
  switch (progress.at) {
    case "chosen":
      return null
    case "refused":
      return <Refusal code={progress.code} message={progress.message} />
    case "waiting":
      return <p role="status">Waits for its turn.</p>
    case "sending":
      return <Sending sent={progress.sent} total={progress.total} />
    case "checking":
      return (
        <div class="sending">
          <progress aria-label="Upload" />
          <span role="status">All sent. The server is checking it.</span>
        </div>
      )
    case "stored":
      return (
        <p class="done" role="status">
          Stored as{" "}
          <a href={`#/adapters/${encodeURIComponent(progress.adapter.name)}`}>{progress.adapter.name}</a>.
        </p>
      )
  }
}

function Sending({ sent, total }: { sent: number; total: number }) {
  return (
    <div class="sending">
      <progress aria-label="Upload" value={sent} max={total} />
      <span>
        {total > 1 && `${bytes(sent)} of ${bytes(total)}, `}
        {Math.floor((100 * sent) / total)} %
      </span>
    </div>
  )
}

export function Refusal({ code, message }: { code: string; message: string }) {
  return (
    <p class="refusal" role="alert">
      {message} <code class="code">{code}</code>
    </p>
  )
}

/** All adapters: what they are and cost, what may be done with them, and how new ones come in. */

import { signal } from "@preact/signals"
import { Pages, TableBar } from "../components/adapters/bar.tsx"
import { matching } from "../components/adapters/list.ts"
import { AdapterTable } from "../components/adapters/table.tsx"
import { ConfirmDialog } from "../components/confirm.tsx"
import { DropZone } from "../components/upload/drop.tsx"
import { UploadPanel } from "../components/upload/panel.tsx"
import { bytes, count } from "../format.ts"
import { usePolling } from "../polling.ts"
import { whyNoChange } from "../rights.ts"
import { adapters, adaptersLoaded, client, keyNeeded, learn, loadAdapters } from "../state.ts"
import { moreAdapters, refuseKey, version } from "../state.ts"
import { ApiError } from "../api.ts"
import { panelOpen } from "../upload/queue.ts"
import "./adapters.css"

const OFTEN_MS = 3000
const SELDOM_MS = 15_000
const MANY = 500 // a list this long is several requests

const stale = signal<string | null>(null) // why the list is not up to date

async function refresh(): Promise<void> {
  if (keyNeeded.value) return // it would be refused
  const asked = client.value
  try {
    // A server that was away may be another one now.
    await (version.value === null || stale.value !== null ? learn() : loadAdapters())
    stale.value = null
  } catch (error) {
    if (asked !== client.value) return
    if (error instanceof ApiError && error.status === 401) {
      refuseKey(error.message)
    } else {
      stale.value = error instanceof Error ? error.message : String(error)
    }
  }
}

export function Adapters() {
  usePolling(refresh, adapters.value.length > MANY ? SELDOM_MS : OFTEN_MS)
  const why = whyNoChange()
  return (
    <div class="adapters-view">
      <div class="heading">
        <h1>Adapters</h1>
        <Totals />
        <button
          type="button"
          class="primary"
          disabled={why !== null}
          title={why ?? undefined}
          aria-expanded={panelOpen.value}
          onClick={() => (panelOpen.value = !panelOpen.value)}
        >
          Add adapter
        </button>
      </div>
      {stale.value !== null && (
        <p class="refusal" role="status">
          This list is not up to date: {stale.value}
        </p>
      )}
      <UploadPanel />
      <List />
      <DropZone />
      <ConfirmDialog />
    </div>
  )
}

function Totals() {
  if (!adaptersLoaded.value) return <p class="totals" />
  const all = adapters.value
  const active = all.find((adapter) => adapter.active)
  const size = all.reduce((sum, { file_bytes }) => sum + file_bytes, 0)
  return (
    <p class="totals">
      {moreAdapters.value && "more than "}
      {all.length === 1 ? "1 adapter" : `${count(all.length)} adapters`} · {bytes(size)} on disk ·{" "}
      {active ? (
        <>
          active: <a href={`#/adapters/${encodeURIComponent(active.name)}`}>{active.name}</a>
          {active.mode === "merge" && ", merged"}
        </>
      ) : (
        "none is active: the base answers"
      )}
    </p>
  )
}

function List() {
  if (!adaptersLoaded.value) {
    return <p class="card empty faint">{keyNeeded.value ? "A key is needed." : "Loading…"}</p>
  }
  if (adapters.value.length === 0) {
    return (
      <div class="card empty">
        <h2>No adapters yet</h2>
        <p class="faint">Drop a directory that PEFT saved onto this page, or choose “Add adapter”.</p>
      </div>
    )
  }
  return (
    <section class="card list" aria-label="The list">
      <TableBar />
      {matching.value.length === 0 ? (
        <p class="empty faint">No adapter has that in its name.</p>
      ) : (
        <div class="wide">
          <AdapterTable />
        </div>
      )}
      <div class="bar below">
        <Pages />
      </div>
    </section>
  )
}

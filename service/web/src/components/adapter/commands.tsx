/** What can be done with the adapter of this page. */

import { activate, busy, deactivate, download } from "../../actions.ts"
import type { AdapterDetail } from "../../api.ts"
import { formatsOf } from "../../download.ts"
import { whyNoChange, whyNoEdit } from "../../rights.ts"
import { confirmDelete } from "../delete.ts"
import { Menu } from "../menu.tsx"

export function Commands({ adapter, changed }: { adapter: AdapterDetail; changed: () => Promise<void> }) {
  const { name, active, mode } = adapter
  const [why, whyNotDelete] = [whyNoChange(), whyNoEdit(adapter)]
  const off = why !== null || busy.value !== null
  const then = async (worked: Promise<boolean>) => {
    if (await worked) await changed()
  }
  const exports = formatsOf(adapter).map(([format, label]) => ({
    label,
    run: () => void download(name, format),
  }))
  const leave = () => {
    location.hash = "#/adapters"
  }
  return (
    <div class="row commands">
      {active ? (
        <button type="button" disabled={off} title={why ?? undefined} onClick={() => then(deactivate(name))}>
          Deactivate
        </button>
      ) : (
        <button
          type="button"
          class="primary"
          disabled={off}
          title={why ?? undefined}
          onClick={() => then(activate(name, "switch"))}
        >
          Activate
        </button>
      )}
      {mode !== "merge" && (
        <button
          type="button"
          disabled={off}
          title={why ?? "Active, and folded into the base weights whenever the batch allows"}
          onClick={() => then(activate(name, "merge"))}
        >
          {active ? "Merge" : "Activate merged"}
        </button>
      )}
      {mode === "merge" && (
        <button
          type="button"
          disabled={off}
          title={why ?? "Active, and computed beside the base weights"}
          onClick={() => then(activate(name, "switch"))}
        >
          Unmerge
        </button>
      )}
      <Menu label="Export" commands={exports}>
        Export
      </Menu>
      <button
        type="button"
        class="danger"
        disabled={whyNotDelete !== null}
        title={whyNotDelete ?? undefined}
        onClick={() => confirmDelete(adapter, leave)}
      >
        Delete
      </button>
    </div>
  )
}

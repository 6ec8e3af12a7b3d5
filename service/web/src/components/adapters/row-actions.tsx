/** What can be done with a row's adapter: the usual in a button, the rest in a menu. */

import { activate, busy, deactivate, download } from "../../actions.ts"
import type { Adapter } from "../../api.ts"
import { formatsOf } from "../../download.ts"
import { whyNoChange, whyNoEdit } from "../../rights.ts"
import { Menu } from "../menu.tsx"
import type { Command } from "../menu.tsx"
import { confirmDelete } from "../delete.ts"

export function RowActions({ adapter }: { adapter: Adapter }) {
  const { name, active } = adapter
  const why = whyNoChange()
  const label = active ? "Deactivate" : "Activate"
  return (
    <span class="row actions">
      <button
        type="button"
        disabled={why !== null || busy.value !== null}
        title={why ?? undefined}
        aria-label={`${label} ${name}`}
        onClick={() => void (active ? deactivate(name) : activate(name, "switch"))}
      >
        {label}
      </button>
      <Menu label={`More for ${name}`} commands={commandsFor(adapter)}>
        <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true" class="dots">
          <circle cx="3" cy="8" r="1.4" />
          <circle cx="8" cy="8" r="1.4" />
          <circle cx="13" cy="8" r="1.4" />
        </svg>
      </Menu>
    </span>
  )
}

function commandsFor(adapter: Adapter): Command[] {
  const { name } = adapter
  const open = () => void (location.hash = `#/adapters/${encodeURIComponent(name)}`)
  const modes: Command[] = [
    { label: "Activate, switched", run: () => void activate(name, "switch"), why: whyNoChange() },
    { label: "Activate, merged into the base", run: () => void activate(name, "merge"), why: whyNoChange() },
  ]
  return [
    { label: "Open", run: open },
    ...modes.filter((_, i) => adapter.mode !== (["switch", "merge"] as const)[i]),
    ...formatsOf(adapter).map(([format, label]) => ({
      label: `Export: ${label}`,
      run: () => void download(name, format),
    })),
    { label: "Delete…", run: () => confirmDelete(adapter), why: whyNoEdit(adapter), danger: true },
  ]
}

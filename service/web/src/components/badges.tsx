/** What an adapter is, in a word or two each. Colours repeat the words, and never say more. */

import type { Adapter, AdapterState } from "../api.ts"

type Shown = Pick<Adapter, "active" | "mode" | "shared" | "state" | "reason" | "warnings">

export function Badges({ adapter, tenant }: { adapter: Shown; tenant: string }) {
  const { length } = adapter.warnings
  return (
    <>
      {adapter.active && (
        <span class="badge active" title="What a request runs with that names no adapter">
          active{adapter.mode === "merge" ? ", merged" : ""}
        </span>
      )}
      {adapter.shared && tenant !== "" && (
        <span class="badge" title="Every tenant sees it">
          shared
        </span>
      )}
      {length > 0 && (
        <span class="badge warn" title={adapter.warnings.join("\n")}>
          {length === 1 ? "1 warning" : `${length} warnings`}
        </span>
      )}
    </>
  )
}

const STATES: Record<AdapterState, [string, string]> = {
  STORED: ["stored", "On disk: its first request loads it"],
  LOADING: ["loading", "Being read into memory"],
  READY: ["ready", "Its factors are in memory"],
  FAILED: ["failed", "It does not bind to the base"],
}

export function State({ adapter }: { adapter: { state: AdapterState; reason?: string | null } }) {
  const [word, meaning] = STATES[adapter.state]
  return (
    <span class={`state ${word}`} title={adapter.reason ?? meaning}>
      <span class="dot" aria-hidden="true" />
      {word}
    </span>
  )
}

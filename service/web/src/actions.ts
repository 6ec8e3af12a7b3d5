/** What can be done with an adapter, from the table and from its own page alike. */

import { signal } from "@preact/signals"
import type { Adapter } from "./api.ts"
import { exportAdapter } from "./download.ts"
import type { Format } from "./download.ts"
import { attempt, client, loadAdapters, notify } from "./state.ts"

/** The adapter that something is being done with, so that nobody does it twice. */
export const busy = signal<string | null>(null)

async function alone(name: string, action: () => Promise<unknown>, done?: string): Promise<boolean> {
  if (busy.value !== null) return false
  busy.value = name
  const worked = await attempt(action, done)
  busy.value = null
  return worked
}

export function activate(name: string, mode: "switch" | "merge"): Promise<boolean> {
  return alone(name, async () => {
    const answer = await client.value.activate(name, mode)
    notify("done", activated(answer))
    await loadAdapters()
  })
}

function activated(adapter: Adapter): string {
  if (adapter.mode !== "merge") return `${adapter.name} is active.`
  const error = adapter.merge_error
  if (error == null) return `${adapter.name} is active, and will be folded in when the batch allows.`
  return `${adapter.name} is active, folded into the base: a relative error of ${error.toExponential(1)}.`
}

export function deactivate(name: string): Promise<boolean> {
  return alone(
    name,
    async () => {
      await client.value.deactivate(name)
      await loadAdapters()
    },
    `${name} is no longer active.`,
  )
}

export function download(name: string, format: Format): Promise<boolean> {
  return alone(name, () => exportAdapter(name, format), `${name} was exported.`)
}

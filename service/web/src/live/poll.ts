/** Asks the server every second how it is, for as long as somebody looks. */

import { signal } from "@preact/signals"
import { ApiError } from "../api.ts"
import type { Stats } from "../api.ts"
import { client, keyRefused } from "../state.ts"
import { keep } from "./ring.ts"

const EVERY_MS = 1000

export const moments = signal<readonly Stats[]>([])
export const trouble = signal<string | null>(null) // why the last question had no answer

let of = client.peek()

/** Begins to ask; returns what ends it. A hidden page does not ask: what happens meanwhile is a gap. */
export function poll(): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined
  let asking = false
  let ended = false

  const ask = async () => {
    clearTimeout(timer)
    if (ended || asking || document.hidden) return
    asking = true
    const begun = performance.now()
    await once()
    asking = false
    timer = setTimeout(ask, Math.max(0, begun + EVERY_MS - performance.now()))
  }
  document.addEventListener("visibilitychange", ask)
  void ask()
  return () => {
    ended = true
    clearTimeout(timer)
    document.removeEventListener("visibilitychange", ask)
  }
}

async function once(): Promise<void> {
  const asked = client.value
  try {
    const stats = await asked.stats()
    if (asked !== client.value) return // somebody else's numbers
    moments.value = keep(of === asked ? moments.value : [], stats)
    of = asked
    trouble.value = null
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) keyRefused.value = error.message
    trouble.value = error instanceof ApiError ? error.message : String(error)
  }
}

/** What every part of the page shares: who asks, what the server is, which adapters there are, and what went wrong. */

import { computed, signal } from "@preact/signals"
import { ApiError, Client } from "./api.ts"
import type { Adapter, Version, WhoAmI } from "./api.ts"

const KEY = "vblora.key"
const PAGE_SIZE = 200
const MOST_ADAPTERS = 2000 // the page shows no more; search by name asks the server's order

/** Kept for this tab alone: a key on disk would outlive its user. */
export const apiKey = signal<string | null>(sessionStorage.getItem(KEY))
export const client = computed(() => new Client(apiKey.value))

export const version = signal<Version | null>(null)
export const whoAmI = signal<WhoAmI | null>(null)
export const keyRefused = signal<string | null>(null) // why, in the server's words; null while all is well

export const adapters = signal<Adapter[]>([])
export const moreAdapters = signal(false) // there are more than the page holds
export const adaptersLoaded = signal(false)

export const mayChange = computed(() => whoAmI.value?.scopes.includes("admin") ?? false)
export const mayInfer = computed(() => whoAmI.value?.scopes.includes("infer") ?? false)

export interface Notice {
  id: number
  kind: "error" | "done"
  text: string
}
export const notices = signal<Notice[]>([])
let lastNotice = 0

const NOTICE_MS = 6000

/** Says something at the edge of the page; errors stay until they are dismissed. */
export function notify(kind: Notice["kind"], text: string): void {
  const id = ++lastNotice
  notices.value = [...notices.value.slice(-4), { id, kind, text }]
  if (kind === "done") setTimeout(() => dismiss(id), NOTICE_MS)
}

export function dismiss(id: number): void {
  notices.value = notices.value.filter((notice) => notice.id !== id)
}

/** Runs an action and says how it ended. Returns whether it did what it should. */
export async function attempt(action: () => Promise<unknown>, done?: string): Promise<boolean> {
  try {
    await action()
    if (done) notify("done", done)
    return true
  } catch (error) {
    report(error)
    return false
  }
}

export function report(error: unknown): void {
  if (error instanceof ApiError) {
    if (error.status === 401) keyRefused.value = error.message
    notify("error", error.message)
  } else {
    notify("error", String(error))
  }
}

export function useKey(key: string | null): void {
  if (key === null) sessionStorage.removeItem(KEY)
  else sessionStorage.setItem(KEY, key)
  apiKey.value = key
}

/** Learns anew who asks and what there is; on a 401 the page asks for a key. */
export async function connect(): Promise<void> {
  try {
    whoAmI.value = await client.value.whoAmI()
    keyRefused.value = null
    version.value = await client.value.version()
    await loadAdapters()
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      whoAmI.value = null
      adapters.value = []
      keyRefused.value = error.message
    } else {
      report(error)
    }
  }
}

export async function loadAdapters(): Promise<void> {
  const asked = client.value
  const found: Adapter[] = []
  let after: string | null = null
  do {
    const page: { data: Adapter[]; next: string | null } = await asked.adapters(PAGE_SIZE, after)
    found.push(...page.data)
    after = page.next
  } while (after !== null && found.length < MOST_ADAPTERS)
  if (asked !== client.value) return // somebody else's list
  adapters.value = found
  moreAdapters.value = after !== null
  adaptersLoaded.value = true
}

/** The views, by the address's fragment: `#/adapters`, `#/adapters/<name>`, `#/playground`, `#/live`. */
export const fragment = signal(location.hash)
addEventListener("hashchange", () => {
  if (location.hash === "" || location.hash.startsWith("#/")) fragment.value = location.hash
})

export const place = computed<{ view: string; name: string | null }>(() => {
  const [view = "", name = ""] = fragment.value.replace(/^#\//, "").split("/")
  return { view: view || "adapters", name: name ? decodeURIComponent(name) : null }
})

/** What every part of the page shares: who asks, what the server is, which adapters there are, and what went wrong. */

import { batch, computed, signal } from "@preact/signals"
import { ApiError, Client } from "./api.ts"
import type { Adapter, Version, WhoAmI } from "./api.ts"
import { store, stored } from "./storage.ts"

const KEY = "vblora.key"
const PAGE_SIZE = 200
const MOST_ADAPTERS = 2000 // the page shows no more; search by name asks the server's order

/** Kept for this tab alone: a key on disk would outlive its user. */
export const apiKey = signal<string | null>(stored("sessionStorage", KEY))
export const client = computed(() => new Client(apiKey.value))

export const version = signal<Version | null>(null)
export const whoAmI = signal<WhoAmI | null>(null)
export const keyNeeded = signal(false) // from a 401 on until a key is taken: asking again would be refused again
export const keyRefused = signal<string | null>(null) // why, in the server's words; null once it was read

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
    if (error.status === 401) refuseKey(error.message)
    notify("error", error.message)
  } else {
    notify("error", String(error))
  }
}

export function useKey(key: string | null): void {
  store("sessionStorage", KEY, key)
  if (key === apiKey.value) return
  batch(() => {
    apiKey.value = key
    clear()
  })
}

/** What was seen with a key is not for whoever has no such key, or no longer. */
function clear(): void {
  whoAmI.value = null
  version.value = null
  adapters.value = []
  moreAdapters.value = false
  adaptersLoaded.value = false
}

/** After a 401: the page asks for another key, and nothing else until it has one. */
export function refuseKey(message: string): void {
  batch(() => {
    clear()
    keyNeeded.value = true
    keyRefused.value = message
  })
}

/** Learns anew who asks and what there is; on a 401 the page asks for a key. */
export async function connect(): Promise<void> {
  const asked = client.value
  try {
    await learn()
  } catch (error) {
    if (asked !== client.value) return // somebody else's trouble
    if (error instanceof ApiError && error.status === 401) refuseKey(error.message)
    else report(error)
  }
}

/** Until the page knows the server, which may have been away when it came. What was said of that is not said again. */
export async function reconnect(): Promise<void> {
  if (adaptersLoaded.value || keyNeeded.value) return
  const asked = client.value
  try {
    await learn()
  } catch (error) {
    if (asked === client.value && error instanceof ApiError && error.status === 401) refuseKey(error.message)
  }
}

export async function learn(): Promise<void> {
  const asked = client.value
  const who = await asked.whoAmI()
  if (asked !== client.value) return
  batch(() => {
    whoAmI.value = who
    keyNeeded.value = false
    keyRefused.value = null
  })
  const found = await asked.version()
  if (asked !== client.value) return
  version.value = found
  await loadAdapters()
}

let [lastAsked, lastShown] = [0, 0]

export async function loadAdapters(): Promise<void> {
  const asked = client.value
  const number = ++lastAsked
  const found: Adapter[] = []
  let after: string | null = null
  do {
    const page: { data: Adapter[]; next: string | null } = await asked.adapters(PAGE_SIZE, after)
    found.push(...page.data)
    after = page.next
  } while (after !== null && found.length < MOST_ADAPTERS)
  if (asked !== client.value) return // somebody else's list
  if (number < lastShown) return // as it was before something that is already shown
  lastShown = number
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
  return { view: view || "adapters", name: name ? decoded(name) : null }
})

/** A link may be cut off, or anyone's: what is no encoding is taken as it stands. */
function decoded(part: string): string {
  try {
    return decodeURIComponent(part)
  } catch {
    return part
  }
}

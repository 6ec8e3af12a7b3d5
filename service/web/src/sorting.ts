/** The table of adapters: what it can be sorted by, and which rows a filter leaves. */

import type { Adapter } from "./api.ts"

export type Column =
  | "name"
  | "digest"
  | "rank"
  | "bank"
  | "targets"
  | "params"
  | "disk"
  | "compression"
  | "state"
  | "requests"
  | "used"

export interface Order {
  column: Column
  down: boolean
}

type Value = string | number | null

/** By the worst first, as one sorts by state to find what is broken. */
const STATES = ["FAILED", "LOADING", "READY", "STORED"]

export const savedParams = (adapter: Adapter): number => adapter.vblora_params ?? adapter.total_params

const VALUES: Record<Column, (adapter: Adapter) => Value> = {
  name: (adapter) => adapter.name,
  digest: (adapter) => adapter.digest,
  rank: (adapter) => adapter.r,
  bank: (adapter) =>
    adapter.num_vectors === null ? null : adapter.num_vectors * (adapter.vector_length ?? 1),
  targets: (adapter) => adapter.target_modules,
  params: savedParams,
  disk: (adapter) => adapter.file_bytes,
  compression: (adapter) =>
    adapter.vblora_params === null ? null : adapter.lora_params / adapter.vblora_params,
  state: (adapter) => STATES.indexOf(adapter.state),
  requests: (adapter) => adapter.requests,
  used: (adapter) => adapter.last_used,
}

/** Names and states read upwards first, numbers from the largest. */
export const startsDown = (column: Column): boolean => !["name", "digest", "state"].includes(column)

export function nextOrder(order: Order, column: Column): Order {
  return { column, down: order.column === column ? !order.down : startsDown(column) }
}

/** Sorted; what has no value comes last either way, and equal ones are in the order of their names. */
export function sorted(adapters: readonly Adapter[], order: Order): Adapter[] {
  const value = VALUES[order.column]
  const sign = order.down ? -1 : 1
  return adapters.toSorted((one, other) => {
    const [a, b] = [value(one), value(other)]
    if (a === null || b === null) {
      if (a !== b) return a === null ? 1 : -1
    } else if (a !== b) {
      return a < b ? -sign : sign
    }
    return one.name < other.name ? -1 : 1
  })
}

/** Those whose name has every word of the filter, in any case; all of a digest's start counts as a name. */
export function filtered(adapters: readonly Adapter[], filter: string): readonly Adapter[] {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean)
  if (words.length === 0) return adapters
  return adapters.filter((adapter) => {
    const name = adapter.name.toLowerCase()
    return words.every((word) => name.includes(word) || isDigest(adapter.digest, word))
  })
}

const isDigest = (digest: string, word: string): boolean =>
  word.length >= 4 && digest.startsWith(`sha256:${word.replace(/^sha256:/, "")}`)

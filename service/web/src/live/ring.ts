/** The last minutes of a server's moments, and what is read off them. Times are the server's, in seconds. */

import type { Stats } from "../api.ts"

export const WINDOW_S = 300
export const GAP_S = 3.5 // with more than that between two moments nothing is known of the time between

/** The moments with one more, without those that are too old; a moment that is no later is left out. */
export function keep(moments: readonly Stats[], next: Stats): Stats[] {
  const last = moments.at(-1)
  if (last !== undefined && next.time <= last.time) {
    // A clock that was set back; little steps wait until it has caught up.
    return last.time - next.time > GAP_S ? [next] : [...moments]
  }
  return [...moments.filter(({ time }) => time > next.time - WINDOW_S), next]
}

export type Reading = number | null

/** Something of each moment; null where the server did not say. */
export function readings(moments: readonly Stats[], read: (stats: Stats) => Reading): Reading[] {
  return moments.map(read)
}

/** How fast a total grew up to each moment, per second; null at the first, behind a gap, and where it began anew. */
export function rates(moments: readonly Stats[], read: (stats: Stats) => Reading): Reading[] {
  return moments.map((moment, i) => {
    const before = moments[i - 1]
    const now = read(moment)
    const then = before ? read(before) : null
    if (before === undefined || now === null || then === null) return null
    const passed = moment.time - before.time
    return passed > GAP_S || now < then ? null : (now - then) / passed
  })
}

export const OTHERS = "others"
export const FOREIGN = "other tenants"

/** Rows by what they run: `most` selections over the whole window, the largest first, and the rest together. */
export function shares(moments: readonly Stats[], most: number): Map<string, number[]> {
  const totals = new Map<string, number>()
  for (const { batch } of moments) {
    for (const { selection, rows } of batch) {
      if (selection !== null) totals.set(selection, (totals.get(selection) ?? 0) + rows)
    }
  }
  const ordered = [...totals].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1)).map(([name]) => name)
  const named = new Set(ordered.slice(0, most))
  const rows = new Map([...named].map((name) => [name, moments.map(() => 0)]))
  moments.forEach(({ batch }, i) => {
    for (const part of batch) {
      const name = part.selection === null ? FOREIGN : named.has(part.selection) ? part.selection : OTHERS
      const counted = rows.get(name) ?? moments.map(() => 0)
      counted[i] = (counted[i] ?? 0) + part.rows
      rows.set(name, counted)
    }
  })
  return rows
}

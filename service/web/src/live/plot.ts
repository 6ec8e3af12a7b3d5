/** Numbers to pictures: axes with round ticks, and the paths of lines and areas, broken where nothing is known. */

import { GAP_S } from "./ring.ts"
import type { Reading } from "./ring.ts"

const TICKS = 4

/** Round ticks from 0 to at least `most`: 1, 2, 2.5 or 5 times a power of ten apart. */
export function ticks(most: number, whole = false): number[] {
  if (most <= 0) return [0, 1]
  const aim = (whole ? Math.max(most, 1) : most) / TICKS
  const power = 10 ** Math.floor(Math.log10(aim))
  const fits = [1, 2, 2.5, 5, 10]
    .map((times) => times * power)
    .filter((step) => !whole || Number.isInteger(step))
  const step = fits.find((each) => each >= aim * 0.999) ?? 1
  const count = Math.max(1, Math.ceil(most / step - 0.001))
  return Array.from({ length: count + 1 }, (_, i) => Number((i * step).toPrecision(12)))
}

export type Scale = (value: number) => number

export interface Drawn {
  times: readonly number[]
  x: Scale
  y: Scale
}

/** The places where what is known hangs together: [first, last] of each. */
export function stretches(times: readonly number[], known: (i: number) => boolean): [number, number][] {
  const found: [number, number][] = []
  times.forEach((time, i) => {
    if (!known(i)) return
    const last = found.at(-1)
    if (last?.[1] === i - 1 && time - (times[i - 1] ?? time) <= GAP_S) last[1] = i
    else found.push([i, i])
  })
  return found
}

/** A line through the values. A moment alone is a short dash: it would not be seen otherwise. */
export function line(values: readonly Reading[], { times, x, y }: Drawn): string {
  return stretches(times, (i) => values[i] != null)
    .map(([first, last]) => {
      const points = range(first, last).map((i) => at(x(times[i] ?? 0), y(values[i] ?? 0)))
      return first === last ? `M${points[0]}h1.5` : `M${points.join("L")}`
    })
    .join("")
}

/** The area between two lines; where the upper is not known there is none. */
export function area(lower: readonly Reading[], upper: readonly Reading[], { times, x, y }: Drawn): string {
  return stretches(times, (i) => upper[i] != null)
    .filter(([first, last]) => first < last)
    .map(([first, last]) => {
      const over = range(first, last).map((i) => at(x(times[i] ?? 0), y(upper[i] ?? 0)))
      const under = range(first, last).map((i) => at(x(times[i] ?? 0), y(lower[i] ?? 0)))
      return `M${over.join("L")}L${under.reverse().join("L")}Z`
    })
    .join("")
}

/** Each series on top of those before it: pairs of lower and upper lines. */
export function stacked(series: readonly (readonly Reading[])[]): { lower: Reading[]; upper: Reading[] }[] {
  let below: Reading[] = (series[0] ?? []).map(() => 0)
  return series.map((values) => {
    const lower = below
    const upper = values.map((value, i) => (value === null ? null : value + (lower[i] ?? 0)))
    below = upper.map((value, i) => value ?? lower[i] ?? 0)
    return { lower, upper }
  })
}

/** The moment that is nearest to a time; -1 of none. */
export function nearest(times: readonly number[], time: number): number {
  let best = -1
  times.forEach((each, i) => {
    if (best < 0 || Math.abs(each - time) < Math.abs((times[best] ?? 0) - time)) best = i
  })
  return best
}

const range = (first: number, last: number): number[] =>
  Array.from({ length: last - first + 1 }, (_, i) => first + i)

const at = (x: number, y: number): string => `${x.toFixed(1)},${y.toFixed(1)}`

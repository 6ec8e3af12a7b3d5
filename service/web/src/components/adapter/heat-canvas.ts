/** Draws a bank's usage: a cell a layer's side and column, darker the larger its share. */

import { rowTops } from "../../heat.ts"
import type { Heat } from "../../heat.ts"

type Colour = readonly [number, number, number]

/** CSS pixels. The profile is the bars above: what all rows together use. */
export interface Layout {
  width: number
  rowSize: number
  gap: number
  profile: number
}

const STEPS = 64
const MIDDLE = 0.6

export const heightOf = (heat: Heat, { rowSize, gap, profile }: Layout): number =>
  profile + heat.rows.length * rowSize + Math.max(0, heat.groups.length - 1) * gap

export function draw(canvas: HTMLCanvasElement, heat: Heat, layout: Layout): void {
  const context = canvas.getContext("2d")
  if (context === null) return
  const dpr = devicePixelRatio
  canvas.width = Math.round(layout.width * dpr)
  canvas.height = Math.round(heightOf(heat, layout) * dpr)
  const colours = ramp(canvas)
  const columns = heat.totals.length
  const edges = Array.from({ length: columns + 1 }, (_, i) => Math.round((i * canvas.width) / columns))
  const cell = (column: number, top: number, bottom: number, colour: string) => {
    const [left = 0, right = 0] = [edges[column], edges[column + 1]]
    context.fillStyle = colour
    context.fillRect(left, top, Math.max(1, right - left), bottom - top)
  }
  const at = (y: number) => Math.round(y * dpr)

  const highest = Math.max(...heat.totals, Number.MIN_VALUE)
  const bars = layout.profile - 4
  heat.totals.forEach((total, column) => {
    cell(column, at(bars * (1 - total / highest)), at(bars), colours[Math.round(MIDDLE * STEPS)] ?? "")
  })
  rowTops(heat, layout.rowSize, layout.gap).forEach((top, i) => {
    const [from, to] = [at(layout.profile + top), at(layout.profile + top + layout.rowSize)]
    context.fillStyle = colours[0] ?? ""
    context.fillRect(0, from, canvas.width, to - from)
    heat.rows[i]?.shares.forEach((share, column) => {
      // The root: most shares are small, and should still be told from none.
      if (share > 0) cell(column, from, to, colours[Math.round(Math.sqrt(share / heat.most) * STEPS)] ?? "")
    })
  })
}

/** From the canvas's background over its accent to its text colour: steadily darker, or lighter in the dark. */
function ramp(canvas: HTMLCanvasElement): string[] {
  const style = getComputedStyle(canvas)
  const [none, some, most] = [style.backgroundColor, style.color, style.borderTopColor].map(parse)
  if (!none || !some || !most) return []
  return Array.from({ length: STEPS + 1 }, (_, i) => {
    const t = i / STEPS
    return t < MIDDLE ? mix(none, some, t / MIDDLE) : mix(some, most, (t - MIDDLE) / (1 - MIDDLE))
  })
}

function parse(colour: string): Colour | null {
  const [r, g, b] = (colour.match(/[\d.]+/g) ?? []).map(Number)
  return r === undefined || g === undefined || b === undefined ? null : [r, g, b]
}

function mix(one: Colour, other: Colour, t: number): string {
  const [r, g, b] = one.map((value, i) => Math.round(value + ((other[i] ?? value) - value) * t))
  return `rgb(${r} ${g} ${b})`
}

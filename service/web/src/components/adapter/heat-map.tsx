/** A picture of which bank vectors each layer uses; the pointer or the arrow keys read it out. */

import { useSignal } from "@preact/signals"
import { useEffect, useRef } from "preact/hooks"
import type { BankUsage } from "../../api.ts"
import { blockOf, percent, rowAt, rowSize, rowTops, vectorsOf } from "../../heat.ts"
import type { Heat } from "../../heat.ts"
import { theme } from "../../theme.ts"
import { draw, heightOf } from "./heat-canvas.ts"
import type { Layout } from "./heat-canvas.ts"
import { Labels, PROFILE } from "./heat-labels.tsx"

const GAP = 4

interface Cell {
  row: number
  column: number
}

interface Props {
  usage: BankUsage
  heat: Heat
  width: number
  labels: number
}

export function HeatMap({ usage, heat, width, labels }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null)
  const cell = useSignal<Cell | null>(null)
  const layout: Layout = { width, rowSize: rowSize(heat.rows.length), gap: GAP, profile: PROFILE }
  const tops = rowTops(heat, layout.rowSize, GAP)

  useEffect(() => {
    const paint = () => canvas.current && draw(canvas.current, heat, layout)
    paint()
    const dark = matchMedia("(prefers-color-scheme: dark)")
    dark.addEventListener("change", paint)
    return () => dark.removeEventListener("change", paint)
  }, [heat, width, theme.value])

  const point = (event: PointerEvent) => {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect()
    const row = rowAt(tops, layout.rowSize, event.clientY - box.top - PROFILE)
    const column = Math.floor(((event.clientX - box.left) / box.width) * usage.columns)
    cell.value = row === null || column < 0 || column >= usage.columns ? null : { row, column }
  }
  const press = (event: KeyboardEvent) => {
    const to = moved(event, cell.value, heat, usage.columns)
    if (to === null) return
    event.preventDefault()
    cell.value = to
  }
  return (
    <>
      <Readout usage={usage} heat={heat} cell={cell.value} />
      <div class="heat">
        <Labels heat={heat} width={labels} tops={tops} size={layout.rowSize} />
        <div
          class="plot"
          role="application"
          aria-roledescription="heat map"
          aria-label="Bank vectors by layer: arrow keys move from cell to cell, Page Up and Page Down from block to block"
          tabIndex={0}
          onPointerMove={point}
          onPointerDown={point}
          onPointerLeave={() => (cell.value = null)}
          onFocus={() => (cell.value ??= { row: 0, column: 0 })}
          onBlur={() => (cell.value = null)}
          onKeyDown={press}
        >
          <canvas ref={canvas} style={{ width: `${width}px`, height: `${heightOf(heat, layout)}px` }} />
          {cell.value && <Marker cell={cell.value} columns={usage.columns} layout={layout} tops={tops} />}
        </div>
      </div>
    </>
  )
}

function Marker({
  cell,
  columns,
  layout,
  tops,
}: {
  cell: Cell
  columns: number
  layout: Layout
  tops: number[]
}) {
  const top = PROFILE + (tops[cell.row] ?? 0)
  const wide = layout.width / columns
  return (
    <>
      <span class="line" style={{ top: `${top}px`, height: `${layout.rowSize}px` }} />
      <span
        class="cell"
        style={{
          left: `${cell.column * wide}px`,
          top: `${top}px`,
          width: `${wide}px`,
          height: `${layout.rowSize}px`,
        }}
      />
    </>
  )
}

function Readout({ usage, heat, cell }: { usage: BankUsage; heat: Heat; cell: Cell | null }) {
  const row = cell && heat.rows[cell.row]
  if (!cell || !row) {
    return <p class="readout faint">Point at a cell, or focus the picture and use the arrow keys.</p>
  }
  const { block, module } = blockOf(row.layer)
  return (
    <p class="readout" role="status" aria-live="polite">
      <strong>
        {block} {module}
      </strong>{" "}
      side {row.side}, {vectorsOf(cell.column, usage)}:{" "}
      <strong>{percent(row.shares[cell.column] ?? 0)}</strong>
      <span class="faint"> of its weight</span>
    </p>
  )
}

function moved(event: KeyboardEvent, from: Cell | null, heat: Heat, columns: number): Cell | null {
  const { row, column } = from ?? { row: 0, column: 0 }
  const group = heat.groups.findIndex(({ to }) => row < to)
  switch (event.key) {
    case "ArrowLeft":
      return { row, column: Math.max(0, column - 1) }
    case "ArrowRight":
      return { row, column: Math.min(columns - 1, column + 1) }
    case "ArrowUp":
      return { row: Math.max(0, row - 1), column }
    case "ArrowDown":
      return { row: Math.min(heat.rows.length - 1, row + 1), column }
    case "Home":
      return { row, column: 0 }
    case "End":
      return { row, column: columns - 1 }
    case "PageUp":
      return { row: heat.groups[Math.max(0, group - 1)]?.from ?? row, column }
    case "PageDown":
      return { row: heat.groups[Math.min(heat.groups.length - 1, group + 1)]?.from ?? row, column }
    default:
      return null
  }
}

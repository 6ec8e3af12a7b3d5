/** A chart of the last five minutes: lines, or areas on top of each other, and a table of the values at one moment. */

import { signal } from "@preact/signals"
import { useEffect, useId, useRef, useState } from "preact/hooks"
import { area, line, nearest, stacked, ticks } from "../../live/plot.ts"
import type { Scale } from "../../live/plot.ts"
import type { Reading } from "../../live/ring.ts"
import { WINDOW_S } from "../../live/ring.ts"
import { Axes } from "./axes.tsx"
import { Legend } from "./legend.tsx"
import { Patterns } from "./patterns.tsx"

export interface Series {
  name: string
  slot: number // colour and pattern
  values: Reading[]
  area?: boolean // on top of the areas before it
}

export type Size = "third" | "half" | "whole" // of the view's width

interface Props {
  title: string
  times: number[]
  series: Series[]
  format: (value: number) => string
  axis?: (value: number, top: number) => string // of the ticks: one unit for all of them
  whole?: boolean // counts: no ticks between 1 and 2
  size?: Size
  note?: string
}

const HEIGHT = 190
const EDGE = { left: 62, right: 10, top: 10, bottom: 24 }

/** The moment that all charts show; null: the latest. */
export const pointed = signal<number | null>(null)

export function Chart({ title, times, series, format, axis, whole, size = "half", note }: Props) {
  const id = useId()
  const [box, width] = useWidth()
  const [spoken, setSpoken] = useState(false) // the moment was chosen by key: say it
  const end = times.at(-1) ?? 0
  const areas = stacked(series.filter((each) => each.area).map(({ values }) => values))
  const lines = series.filter((each) => !each.area)
  const marks = ticks(
    highest([...areas.map(({ upper }) => upper), ...lines.map(({ values }) => values)]),
    whole,
  )
  const x: Scale = (time) =>
    EDGE.left + ((time - end + WINDOW_S) / WINDOW_S) * (width - EDGE.left - EDGE.right)
  const y: Scale = (value) =>
    HEIGHT - EDGE.bottom - (value / (marks.at(-1) ?? 1)) * (HEIGHT - EDGE.top - EDGE.bottom)
  const shown = pointed.value === null ? times.length - 1 : nearest(times, pointed.value)
  const drawn = { times, x, y }

  const onPointerMove = (event: PointerEvent & { currentTarget: SVGSVGElement }) => {
    const left = event.currentTarget.getBoundingClientRect().left
    const share = (event.clientX - left - EDGE.left) / (width - EDGE.left - EDGE.right)
    pointed.value = end - WINDOW_S + share * WINDOW_S
  }
  const onKeyDown = (event: KeyboardEvent) => {
    const to = moved(event.key, shown, times.length - 1)
    if (to === undefined) return
    event.preventDefault()
    pointed.value = to === null ? null : (times[to] ?? null)
    setSpoken(true)
  }
  const leave = () => {
    pointed.value = null
    setSpoken(false)
  }
  return (
    <figure class={`card chart ${size}`} aria-labelledby={`${id}-title`}>
      <figcaption>
        <h2 id={`${id}-title`}>{title}</h2>
        <span class="faint when">{pointed.value === null ? "now" : ago(end - (times[shown] ?? end))}</span>
      </figcaption>
      <div
        ref={box}
        class="chart-plot"
        tabIndex={0}
        role="group"
        aria-label={`${title}, the last five minutes; arrow keys go through them`}
        onKeyDown={onKeyDown}
        onBlur={leave}
      >
        <svg
          width={width}
          height={HEIGHT}
          aria-hidden="true"
          onPointerMove={onPointerMove}
          onPointerLeave={leave}
        >
          <Patterns id={id} slots={series.filter((each) => each.area).map(({ slot }) => slot)} />
          <Axes
            marks={marks}
            x={x}
            y={y}
            end={end}
            format={(mark) => (axis ?? format)(mark, marks.at(-1) ?? 0)}
            width={width}
          />
          {series
            .filter((each) => each.area)
            .map(({ name, slot }, i) => (
              <path
                key={name}
                class={`area s${slot}`}
                fill={`url(#${id}-p${slot})`}
                d={area(areas[i]?.lower ?? [], areas[i]?.upper ?? [], drawn)}
              />
            ))}
          {lines.map(({ name, slot, values }) => (
            <path key={name} class={`line s${slot}`} d={line(values, drawn)} />
          ))}
          {pointed.value !== null && times.length > 0 && (
            <path class="cursor" d={`M${x(times[shown] ?? end)},${EDGE.top}V${HEIGHT - EDGE.bottom}`} />
          )}
        </svg>
      </div>
      <Legend id={id} title={title} series={series} at={shown} format={format} />
      {note !== undefined && <p class="faint note">{note}</p>}
      <p class="offscreen" aria-live="polite">
        {spoken && `${ago(end - (times[shown] ?? end))}: ${sentence(series, shown, format)}`}
      </p>
    </figure>
  )
}

/** Where a key leads: a moment, null back to the latest, undefined nowhere. */
function moved(key: string, at: number, last: number): number | null | undefined {
  if (key === "ArrowLeft") return Math.max(0, at - 1)
  if (key === "ArrowRight") return at + 1 > last ? null : at + 1
  if (key === "PageUp") return Math.max(0, at - 30)
  if (key === "PageDown") return at + 30 > last ? null : at + 30
  if (key === "Home") return 0
  if (key === "End" || key === "Escape") return null
  return undefined
}

function highest(rows: readonly (readonly Reading[])[]): number {
  return Math.max(0, ...rows.flatMap((values) => values.flatMap((value) => value ?? [])))
}

export function ago(passed: number): string {
  if (passed < 0.5) return "now"
  return passed < 60
    ? `${Math.round(passed)} s ago`
    : `${Math.floor(passed / 60)} min ${Math.round(passed % 60)} s ago`
}

function sentence(series: Series[], at: number, format: (value: number) => string): string {
  return series
    .map(({ name, values }) => `${name} ${values[at] == null ? "unknown" : format(values[at])}`)
    .join(", ")
}

/** The width that the layout gives, followed as it changes. */
function useWidth() {
  const box = useRef<HTMLDivElement>(null)
  const [width, setWidth] = useState(360)
  useEffect(() => {
    if (box.current === null) return
    const observer = new ResizeObserver(([entry]) => entry && setWidth(Math.floor(entry.contentRect.width)))
    observer.observe(box.current)
    return () => observer.disconnect()
  }, [])
  return [box, width] as const
}

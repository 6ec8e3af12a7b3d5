import type { Scale } from "../../live/plot.ts"
import { WINDOW_S } from "../../live/ring.ts"

interface Props {
  marks: number[]
  x: Scale
  y: Scale
  end: number
  format: (value: number) => string
  width: number
}

/** Lines at round values, and a minute at a time; the times stand still while the values pass. */
export function Axes({ marks, x, y, end, format, width }: Props) {
  const minutes = Array.from({ length: WINDOW_S / 60 + 1 }, (_, i) => i)
  const base = y(0)
  return (
    <g class="axes">
      {marks.map((mark) => (
        <g key={mark}>
          <path d={`M${x(end - WINDOW_S)},${Math.round(y(mark)) + 0.5}H${width - 10}`} />
          <text x={x(end - WINDOW_S) - 8} y={y(mark)} dy="0.33em" text-anchor="end">
            {format(mark)}
          </text>
        </g>
      ))}
      {minutes.map((minute) => (
        <text
          key={minute}
          x={x(end - minute * 60)}
          y={base + 17}
          text-anchor={minute === 0 ? "end" : "middle"}
        >
          {minute === 0 ? "now" : `−${minute} min`}
        </text>
      ))}
    </g>
  )
}

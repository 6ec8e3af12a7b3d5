/** The names beside the picture: of blocks, of layers, and of a layer's sides, as far as there is room. */

import { Fragment } from "preact"
import { blockOf, labelWidth } from "../../heat.ts"
import type { Heat } from "../../heat.ts"

export const PROFILE = 44
const LABEL_PX = 14 // a name needs this height

interface Props {
  heat: Heat
  width: number
  tops: readonly number[]
  size: number
}

export function Labels({ heat, width, tops, size }: Props) {
  const topOf = (row: number) => PROFILE + (tops[row] ?? 0)
  const detailed = width > labelWidth(0, size)
  let free = -Infinity
  return (
    <div
      class={detailed ? "labels detailed" : "labels"}
      style={{ flexBasis: `${width}px` }}
      aria-hidden="true"
    >
      <span class="all" style={{ top: `${PROFILE / 2 - 10}px` }}>
        all layers
      </span>
      {heat.groups.map(({ label, from }) => {
        const top = topOf(from)
        if (top < free) return null // many thin blocks: those that fit are named
        free = top + LABEL_PX
        return (
          <span key={from} class="block" style={{ top: `${top - 1}px` }} title={label}>
            {label || "other"}
          </span>
        )
      })}
      {detailed &&
        heat.rows.map(({ layer, side }, row) => (
          <Fragment key={row}>
            {side === "A" && (
              <span class="module" style={{ top: `${topOf(row) + size - LABEL_PX / 2}px` }}>
                {blockOf(layer).module.split(".").at(-1)}
              </span>
            )}
            {size >= 10 && (
              <span class="side" style={{ top: `${topOf(row) + (size - LABEL_PX) / 2}px` }}>
                {side}
              </span>
            )}
          </Fragment>
        ))}
    </div>
  )
}

/** The picture of a bank's usage as rows and columns: which rows, in which groups, and what each column is. */

import type { BankUsage } from "./api.ts"

export interface HeatRow {
  layer: string
  side: "A" | "B"
  shares: readonly number[]
}

/** Neighbouring rows of one block of the model, such as all of "layers.0". */
export interface Group {
  label: string
  from: number
  to: number // exclusive
}

export interface Heat {
  rows: HeatRow[]
  groups: Group[]
  most: number // the largest share: what the darkest colour stands for
  totals: number[] // a column's mean share over all rows
}

/** "model.layers.3.self_attn.q_proj" is of the block "layers.3", "lm_head" of none. */
export function blockOf(layer: string): { block: string; module: string } {
  const match = /^(.*?\d+)\.(.+)$/.exec(layer)
  if (!match) return { block: "", module: layer }
  const [, block = "", module = ""] = match
  return { block: block.replace(/^(base_model\.|model\.|transformer\.)+/, ""), module }
}

export function heatOf(usage: BankUsage): Heat {
  const rows = usage.layers.flatMap(({ name, A, B }): HeatRow[] => [
    { layer: name, side: "A", shares: A },
    { layer: name, side: "B", shares: B },
  ])
  const groups: Group[] = []
  const totals = new Array<number>(usage.columns).fill(0)
  let most = 0
  rows.forEach(({ layer, shares }, i) => {
    const { block: label } = blockOf(layer)
    const last = groups.at(-1)
    if (last?.label === label) last.to = i + 1
    else groups.push({ label, from: i, to: i + 1 })
    shares.forEach((share, column) => {
      totals[column] = (totals[column] ?? 0) + share / rows.length
      most = Math.max(most, share)
    })
  })
  return { rows, groups, most, totals }
}

type Columns = Pick<BankUsage, "vectors_per_column" | "num_vectors">

/** "vector 7", or "vectors 12 to 15" of a column that stands for several. */
export function vectorsOf(column: number, { vectors_per_column: width, num_vectors }: Columns): string {
  const from = column * width
  const to = Math.min(from + width, num_vectors) - 1
  return from === to ? `vector ${from}` : `vectors ${from} to ${to}`
}

/** The columns with the largest shares, largest first; those without any are left out. */
export function largest(shares: readonly number[], many: number): { column: number; share: number }[] {
  return shares
    .map((share, column) => ({ column, share }))
    .filter(({ share }) => share > 0)
    .sort((one, other) => other.share - one.share || one.column - other.column)
    .slice(0, many)
}

/** How many columns fit: powers of two, so that few widths ask the server anew. */
export function columnsFor(width: number): number {
  const MIN_PX = 3
  const fits = Math.max(16, Math.min(1024, Math.floor(width / MIN_PX)))
  return 2 ** Math.floor(Math.log2(fits))
}

/** Where each row lies: `size` px each, with a gap between groups. */
export function rowTops(heat: Heat, size: number, gap: number): number[] {
  const tops: number[] = []
  heat.groups.forEach(({ from, to }, group) => {
    for (let row = from; row < to; row++) tops.push(row * size + group * gap)
  })
  return tops
}

/** The row at a height, that below a gap for a gap; null above and below all of them. */
export function rowAt(tops: readonly number[], size: number, y: number): number | null {
  const row = tops.findIndex((top) => y < top + size)
  return y < 0 || row < 0 ? null : row
}

/** How much room the names of rows take: those of blocks always, those of layers where both are wide and high enough. */
export const labelWidth = (width: number, size: number): number => (width >= 720 && size * 2 >= 14 ? 186 : 92)

/** Large pictures have thin rows: all of a big model should be seen at once. */
export const rowSize = (rows: number): number =>
  Math.max(4, Math.min(12, Math.floor(720 / Math.max(1, rows))))

export const percent = (share: number): string =>
  share === 0 ? "0 %" : share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`

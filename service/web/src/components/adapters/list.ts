/** What the table shows: kept beside the view, so that it is as it was when one comes back to it. */

import { computed, signal } from "@preact/signals"
import { filtered, sorted } from "../../sorting.ts"
import type { Order } from "../../sorting.ts"
import { adapters } from "../../state.ts"

const ROWS = 50

export const order = signal<Order>({ column: "name", down: false })
export const filter = signal("")
const wanted = signal(0)

export const matching = computed(() => sorted(filtered(adapters.value, filter.value), order.value))
export const pages = computed(() => Math.max(1, Math.ceil(matching.value.length / ROWS)))
/** Never beyond the last one, whatever has been deleted or filtered meanwhile. */
export const page = computed(() => Math.min(wanted.value, pages.value - 1))
export const rows = computed(() => matching.value.slice(page.value * ROWS, (page.value + 1) * ROWS))
export const first = computed(() => page.value * ROWS)

export const turnTo = (to: number): void => {
  wanted.value = Math.max(0, to)
}

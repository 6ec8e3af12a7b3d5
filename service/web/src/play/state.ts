/** The playground's signals, and what changes them. */

import { computed, effect, signal } from "@preact/signals"
import type { WeightedName } from "../api.ts"
import { adapters, fragment } from "../state.ts"
import { BASE_NAME, DEFAULT, MOST_COLUMNS, jsonOf, setupFrom } from "./setup.ts"
import type { Column, Options, Setup } from "./setup.ts"

const KEY = "vblora.playground"
const stored = sessionStorage.getItem(KEY)

export const setup = signal<Setup>(stored === null ? DEFAULT : setupFrom(stored))
effect(() => sessionStorage.setItem(KEY, jsonOf(setup.value)))

export const full = computed(() => setup.value.columns.length >= MOST_COLUMNS)

/** A link's part behind `#/playground/`: an adapter's name, to compare with the base; or a whole setup. */
export function openLinked(part: string): void {
  if (part.startsWith("{")) setup.value = setupFrom(part)
  else if (part !== "") {
    const columns: Column[] = [BASE_NAME, part].map((name, i) => ({
      id: i + 1,
      kind: "one",
      name,
      blend: [],
    }))
    setup.value = { ...setup.value, columns, reference: 1 }
  }
  history.replaceState(null, "", "#/playground")
  fragment.value = "#/playground"
}

export const linkTo = (): string =>
  new URL(`#/playground/${encodeURIComponent(jsonOf(setup.value))}`, location.href).href

/** The active adapter, or the first, in columns that have none yet. */
export function fillIn(): void {
  const first = adapters.value.find((adapter) => adapter.active) ?? adapters.value[0]
  if (first === undefined || setup.value.columns.every((column) => column.name !== "")) return
  for (const column of setup.value.columns) {
    if (column.name === "") change(column.id, { name: first.name })
  }
}

export function setText(name: "prompt" | "texts", value: string): void {
  setup.value = { ...setup.value, [name]: value }
}

export function setOptions(changed: Partial<Options>): void {
  setup.value = { ...setup.value, options: { ...setup.value.options, ...changed } }
}

export function change(id: number, changed: Partial<Omit<Column, "id">>): void {
  const columns = setup.value.columns.map((column) => (column.id === id ? { ...column, ...changed } : column))
  setup.value = { ...setup.value, columns }
}

/** Shows a column as a blend; the first time, of what it was. */
export function toBlend(column: Column): void {
  const first = column.name === BASE_NAME || column.name === "" ? adapters.value[0]?.name : column.name
  const begun: WeightedName[] = first === undefined ? [] : [{ name: first, weight: 1 }]
  change(column.id, { kind: "blend", blend: column.blend.length > 0 ? column.blend : begun })
}

let lastId = 0 // an id is not used again: the answers of a column that was removed are not another's

export function addColumn(): void {
  if (full.value) return
  const { columns } = setup.value
  const id = Math.max(lastId, ...columns.map((column) => column.id)) + 1
  lastId = id
  const taken = new Set(columns.map((column) => column.name))
  const next = adapters.value.find((adapter) => !taken.has(adapter.name)) ?? adapters.value[0]
  const column: Column = { id, kind: "one", name: next?.name ?? BASE_NAME, blend: [] }
  setup.value = { ...setup.value, columns: [...columns, column] }
}

export function removeColumn(id: number): void {
  const columns = setup.value.columns.filter((column) => column.id !== id)
  const [first] = columns
  if (first === undefined) return
  lastId = Math.max(lastId, id)
  const reference = setup.value.reference === id ? first.id : setup.value.reference
  setup.value = { ...setup.value, columns, reference }
}

export function setReference(id: number): void {
  setup.value = { ...setup.value, reference: id }
}

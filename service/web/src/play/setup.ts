/** What the playground is set to: a prompt, what answers it, and how. Kept for the tab, and shareable in a link. */

import type { Selection, WeightedName } from "../api.ts"
import type { GenerateRequest } from "../stream.ts"

export const MOST_COLUMNS = 6 // a browser opens no more than six connections to one server
export const BASE_NAME = "base"

/** One adapter (or the base model), or a weighted sum; each keeps its own while the other is shown. */
export interface Column {
  id: number
  kind: "one" | "blend"
  name: string
  blend: WeightedName[]
}

export interface Options {
  max_new_tokens: number | null
  temperature: number | null
  top_p: number | null
  top_k: number | null
  seed: number | null
  mode: "switch" | "merge"
}

export interface Setup {
  prompt: string
  texts: string // of tasks that read texts: one a line
  columns: Column[]
  reference: number // the id of the column that the others are compared with
  options: Options
}

export const DEFAULT: Setup = {
  prompt: "Open a file and",
  texts: "Where is my parcel?\nWhen will the package arrive?\nI would like my money back.",
  columns: [
    { id: 1, kind: "one", name: BASE_NAME, blend: [] },
    { id: 2, kind: "one", name: "", blend: [] },
  ],
  reference: 1,
  options: { max_new_tokens: 64, temperature: 0, top_p: null, top_k: null, seed: null, mode: "switch" },
}

export function selectionOf(column: Column): Selection {
  return column.kind === "one" ? { adapter: column.name } : { adapters: column.blend }
}

/** What a column is called where there is little room. */
export function titleOf(column: Column): string {
  if (column.kind === "one") return column.name === "" ? "no adapter chosen" : column.name
  return column.blend.map(({ name, weight }) => `${name || "?"} × ${weight}`).join(" + ") || "an empty blend"
}

/** Why a column cannot run yet; null if it can. */
export function lackOf(column: Column): string | null {
  if (column.kind === "one") return column.name === "" ? "Choose an adapter first." : null
  if (column.blend.length === 0) return "Add an adapter to the blend first."
  return column.blend.some(({ name }) => name === "") ? "Choose an adapter in every row of the blend." : null
}

/** The fields of a generation besides its selection. Empty ones are the server's defaults. */
export function samplingOf(options: Options): Omit<GenerateRequest, "prompt"> {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null))
}

/** A command that asks the same. The key stays out of it: a copied command is soon somewhere else. */
export function curl(url: string, body: unknown, keyed: boolean): string {
  const quoted = `'${JSON.stringify(body).replaceAll("'", `'\\''`)}'`
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $VBLORA_API_KEY"` : ""
  return `curl -sN ${url} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted}`
}

export const lines = (texts: string): string[] =>
  texts.split("\n").flatMap((line) => (line.trim() === "" ? [] : [line.trim()]))

/** A setup from JSON of anyone's making: what does not fit is as it is by default. */
export function setupFrom(json: string, fallback: Setup = DEFAULT): Setup {
  let given: unknown
  try {
    given = JSON.parse(json)
  } catch {
    return fallback
  }
  if (!isRecord(given)) return fallback
  const columns = Array.isArray(given["columns"]) ? given["columns"].flatMap(columnFrom) : []
  const kept = columns.length > 0 ? columns.slice(0, MOST_COLUMNS) : fallback.columns
  const reference = kept.find((column) => column.id === given["reference"]) ?? kept[0]
  return {
    prompt: textFrom(given["prompt"], fallback.prompt),
    texts: textFrom(given["texts"], fallback.texts),
    columns: kept,
    reference: reference?.id ?? 0,
    options: isRecord(given["options"]) ? optionsFrom(given["options"], fallback.options) : fallback.options,
  }
}

function columnFrom(given: unknown, index: number): Column[] {
  if (!isRecord(given)) return []
  const blend = Array.isArray(given["blend"]) ? given["blend"].flatMap(weightedFrom) : []
  const kind = given["kind"] === "blend" ? "blend" : "one"
  return [{ id: index + 1, kind, name: textFrom(given["name"], ""), blend }]
}

function weightedFrom(given: unknown): WeightedName[] {
  if (!isRecord(given)) return []
  return [{ name: textFrom(given["name"], ""), weight: numberFrom(given["weight"], 1) ?? 1 }]
}

function optionsFrom(given: Record<string, unknown>, fallback: Options): Options {
  const number = (name: Exclude<keyof Options, "mode">) => numberFrom(given[name], fallback[name])
  return {
    max_new_tokens: number("max_new_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    seed: number("seed"),
    mode: given["mode"] === "merge" ? "merge" : "switch",
  }
}

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value)

const textFrom = (value: unknown, fallback: string): string => (typeof value === "string" ? value : fallback)

function numberFrom(value: unknown, fallback: number | null): number | null {
  return value === null || (typeof value === "number" && Number.isFinite(value)) ? value : fallback
}

/** For storage and links: column ids are their places, so that what is read back refers to the same. */
export function jsonOf(setup: Setup): string {
  const place = setup.columns.findIndex((column) => column.id === setup.reference)
  return JSON.stringify({ ...setup, reference: place + 1 })
}

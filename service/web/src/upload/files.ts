/** Which of the files that were chosen or dropped belong to which adapter. */

/** The parts of an upload, the small ones first: the server can refuse a config before the weights have come. */
export const PARTS = {
  config: "adapter_config.json",
  tokenizer_config: "tokenizer_config.json",
  chat_template: "chat_template.jinja",
  labels: "labels.json",
  weights: "adapter_model.safetensors",
} as const
export type Part = keyof typeof PARTS
const PART_NAMES = Object.keys(PARTS) as Part[]
const REQUIRED: readonly Part[] = ["config", "weights"]

export type Files = Partial<Record<Part, File>>

/** A file and where it lay: "run/sql/adapter_config.json", or its bare name. */
export interface Found {
  path: string
  file: File
}

/** One adapter's files. `directory` is null for files that came without one; `others` are not sent. */
export interface Batch {
  directory: string | null
  files: Files
  others: string[]
}

export const partOf = (filename: string): Part | null =>
  PART_NAMES.find((part) => PARTS[part] === filename) ?? null

export const missing = (files: Files): string[] =>
  REQUIRED.filter((part) => files[part] === undefined).map((part) => PARTS[part])

/** A batch a directory that has an adapter's config or weights; if none has, all of it together, to say what lacks. */
export function batches(found: readonly Found[]): Batch[] {
  const folders = new Map<string, Found[]>()
  for (const one of found) {
    const folder = one.path.slice(0, Math.max(0, one.path.lastIndexOf("/")))
    folders.set(folder, [...(folders.get(folder) ?? []), one])
  }
  const all = [...folders].map(([folder, inside]) => batch(folder, inside))
  const whole = all.filter(({ files }) => REQUIRED.some((part) => files[part] !== undefined))
  if (whole.length > 0 || all.length === 0) return whole
  const loose = all.find(({ files }) => Object.keys(files).length > 0)
  return [loose ?? { directory: null, files: {}, others: found.map(({ path }) => path) }]
}

function batch(folder: string, inside: readonly Found[]): Batch {
  const files: Files = {}
  const others: string[] = []
  for (const { path, file } of inside) {
    const part = partOf(path.slice(path.lastIndexOf("/") + 1))
    if (part === null) others.push(path.slice(path.lastIndexOf("/") + 1))
    else files[part] = file
  }
  return { directory: folder === "" ? null : folder.slice(folder.lastIndexOf("/") + 1), files, others }
}

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/

/** Why the server would refuse a name; null if it would not for its letters. */
export function nameFault(name: string): string | null {
  if (name === "") return "Give it a name."
  if (NAME.test(name)) return null
  return "1 to 128 letters, digits, “.”, “_” and “-”, the first a letter or a digit."
}

/** The name that a directory suggests, by the server's rules. */
export function nameFrom(directory: string | null): string {
  return (directory ?? "")
    .normalize("NFKD")
    .replace(/\p{Mark}/gu, "")
    .replace(/[^A-Za-z0-9._-]+/g, "-")
    .replace(/^[^A-Za-z0-9]+/, "")
    .slice(0, 128)
}

/** What an upload asks for, as a path and a form. */

import { PARTS } from "./files.ts"
import type { Files, Part } from "./files.ts"

export type Activation = "" | "switch" | "merge"

export interface Options {
  name: string
  replace: boolean
  mismatch: boolean
  activate: Activation
}

export function uploadPath({ replace, mismatch }: Options): string {
  const query = new URLSearchParams()
  if (replace) query.set("replace", "true")
  if (mismatch) query.set("allow_base_mismatch", "true")
  return query.size > 0 ? `v1/adapters?${query}` : "v1/adapters"
}

/** The name comes first: the server refuses a bad one before it reads on. */
export function formOf(options: Options, files: Files): FormData {
  const form = new FormData()
  form.append("name", options.name)
  if (options.activate) form.append("activate", options.activate)
  for (const part of Object.keys(PARTS) as Part[]) {
    const file = files[part]
    if (file) form.append(part, file, PARTS[part])
  }
  return form
}

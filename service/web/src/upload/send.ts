/** One upload over XMLHttpRequest: fetch cannot say how much of a body is on its way. */

import { ApiError, errorOf } from "../api.ts"
import type { Adapter, Client } from "../api.ts"
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

/** Resolves to the stored adapter. ApiError in the server's words; an AbortError when `signal` ends it. */
export function send(
  client: Client,
  options: Options,
  files: Files,
  onProgress: (sent: number, total: number) => void,
  signal: AbortSignal,
): Promise<Adapter> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest()
    request.open("POST", client.url(uploadPath(options)))
    for (const [name, value] of Object.entries(client.headers)) request.setRequestHeader(name, value)
    request.upload.onprogress = ({ loaded, total }) => onProgress(loaded, total)
    request.upload.onload = ({ loaded }) => onProgress(loaded, loaded)
    request.onload = () => {
      const { status, responseText } = request
      if (status >= 200 && status < 300) resolve(JSON.parse(responseText) as Adapter)
      else reject(errorOf(status, responseText, request.getResponseHeader("Retry-After")))
    }
    request.onerror = () =>
      reject(new ApiError(0, "unreachable", "The connection broke before the server answered.", null, null))
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"))
    signal.addEventListener("abort", () => request.abort())
    request.send(formOf(options, files))
  })
}

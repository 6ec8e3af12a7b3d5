/** One upload over XMLHttpRequest: fetch cannot say how much of a body is on its way. */

import { ApiError, brokenAnswer, errorOf } from "../api.ts"
import type { Adapter, Client } from "../api.ts"
import type { Files } from "./files.ts"
import { formOf, uploadPath } from "./form.ts"
import type { Options } from "./form.ts"

/** A browser tells the one from the other to nobody. */
const BROKE = "The connection broke before the server answered, or a file has changed since it was chosen."

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
      if (status < 200 || status >= 300) {
        reject(errorOf(status, responseText, request.getResponseHeader("Retry-After")))
        return
      }
      try {
        resolve(JSON.parse(responseText) as Adapter)
      } catch {
        reject(brokenAnswer())
      }
    }
    request.onerror = () => reject(new ApiError(0, "unreachable", BROKE, null, null))
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"))
    signal.addEventListener("abort", () => request.abort())
    request.send(formOf(options, files))
  })
}

/** Server-sent events of `POST /v1/generate`, delta by delta. */

import { ApiError, errorOf } from "./api.ts"
import type { Client, Selection } from "./api.ts"

export interface Delta {
  id: string
  selection?: { adapters: { name: string; digest: string; weight: number }[]; mode: string } | null
  choices: { index: number; text: string; token_ids: number[]; finish_reason: string | null }[]
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number } | null
  timing?: { queue_s: number; first_token_s: number; total_s: number } | null
}

export interface GenerateRequest {
  prompt: string
  max_new_tokens?: number
  temperature?: number
  top_p?: number
  top_k?: number
  seed?: number
  mode?: "switch" | "merge"
}

/** Yields each delta; throws ApiError if the server refuses, or fails on the way. */
export async function* generate(
  client: Client,
  request: GenerateRequest,
  selection: Selection,
  signal: AbortSignal,
): AsyncGenerator<Delta> {
  const response = await client.fetch("v1/generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, ...selection, stream: true }),
    signal,
  })
  if (response.body === null) throw new ApiError(0, "unreachable", "The answer has no body.", null, null)
  let ended = false
  for await (const { event, data } of events(response.body)) {
    if (event === "error") throw errorOf(response.status, data)
    if (data === "[DONE]") {
      ended = true
      break
    }
    yield JSON.parse(data) as Delta
  }
  if (!ended) brokeOff(null)
}

/** Whether the connection was cut, or closed too early; but a stream that the reader itself stops is no fault. */
function brokeOff(error: unknown): never {
  if (error instanceof DOMException && error.name === "AbortError") throw error
  throw new ApiError(0, "unreachable", "The stream broke off before its end.", null, null)
}

/** Events of a stream, as the standard has them: fields a line, an empty line ends one. */
export async function* events(
  body: ReadableStream<Uint8Array>,
): AsyncGenerator<{ event: string; data: string }> {
  const reader = body
    .pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>)
    .getReader()
  let rest = ""
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(brokeOff)
      if (done) return
      const blocks = (rest + value).split(/\r?\n\r?\n/)
      rest = blocks.pop() ?? ""
      for (const block of blocks) {
        const parsed = parse(block)
        if (parsed) yield parsed
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined)
  }
}

function parse(block: string): { event: string; data: string } | null {
  let event = "message"
  const data: string[] = []
  for (const line of block.split(/\r?\n/)) {
    const [field, value] = split(line)
    if (field === "event") event = value
    if (field === "data") data.push(value)
  }
  return data.length > 0 ? { event, data: data.join("\n") } : null
}

function split(line: string): [string, string] {
  const colon = line.indexOf(":")
  return colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")]
}

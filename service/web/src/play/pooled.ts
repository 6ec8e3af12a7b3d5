/** Classifications and embeddings of the playground's texts. */

import type { Client } from "../api.ts"
import type { Delta } from "../stream.ts"
import { cosines } from "./cosine.ts"

export interface Classified {
  label: string | null
  probs: number[]
}

export type Pooled =
  | { status: "waiting" }
  | { status: "stopped" }
  | { status: "failed"; message: string; code: string }
  | {
      status: "done"
      texts: string[]
      ran: Delta["selection"]
      tokens: number
      seconds: number
      classes?: Classified[]
      cosines?: number[][]
      dimensions?: number
    }

interface Listed<T> {
  selection?: Delta["selection"]
  data: T[]
  usage: { prompt_tokens: number }
}

type Body = object & { mode: string }

export async function classify(
  client: Client,
  texts: string[],
  body: Body,
  signal: AbortSignal,
): Promise<Pooled> {
  const begun = performance.now()
  const answer = await client.json<Listed<Classified>>(
    "POST",
    "v1/classify",
    { input: texts, ...body },
    signal,
  )
  return { ...common(texts, answer, begun), classes: answer.data }
}

export async function embed(
  client: Client,
  texts: string[],
  body: Body,
  signal: AbortSignal,
): Promise<Pooled> {
  const begun = performance.now()
  const answer = await client.json<Listed<{ embedding: number[] }>>(
    "POST",
    "v1/embeddings",
    { input: texts, ...body },
    signal,
  )
  const vectors = answer.data.map(({ embedding }) => embedding)
  return {
    ...common(texts, answer, begun),
    cosines: cosines(vectors),
    dimensions: vectors[0]?.length ?? 0,
  }
}

function common(texts: string[], answer: Listed<unknown>, begun: number) {
  return {
    status: "done",
    texts,
    ran: answer.selection ?? null,
    tokens: answer.usage.prompt_tokens,
    seconds: (performance.now() - begun) / 1000,
  } as const
}

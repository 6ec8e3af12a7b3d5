/** What a column has been answered so far, and how fast. */

import type { Delta } from "../stream.ts"
import type { Piece } from "./diverge.ts"

export interface Answer {
  status: "waiting" | "streaming" | "done" | "stopped" | "failed"
  tokens: number[]
  pieces: Piece[]
  text: string
  begunAt: number // ms, as performance.now()
  firstAt: number | null
  lastAt: number | null
  finish: string | null
  ran: Delta["selection"]
  usage: Delta["usage"]
  timing: Delta["timing"]
  seed: number | null
  of: string // what was asked, as the column was called then
  error: { message: string; code: string } | null
}

export function blank(of: string, now: number, seed: number | null): Answer {
  return {
    status: "waiting",
    tokens: [],
    pieces: [],
    text: "",
    begunAt: now,
    firstAt: null,
    lastAt: null,
    finish: null,
    ran: null,
    usage: null,
    timing: null,
    seed,
    of,
    error: null,
  }
}

export function take(answer: Answer, delta: Delta, now: number): void {
  const [choice] = delta.choices
  if (choice) {
    answer.tokens.push(...choice.token_ids)
    answer.pieces.push({ text: choice.text, tokens: choice.token_ids.length })
    answer.text += choice.text
    answer.finish = choice.finish_reason ?? answer.finish
    if (choice.token_ids.length > 0) {
      answer.firstAt ??= now
      answer.lastAt = now
    }
  }
  answer.status = answer.finish === null ? "streaming" : "done"
  answer.ran = delta.selection ?? answer.ran
  answer.usage = delta.usage ?? answer.usage
  answer.timing = delta.timing ?? answer.timing
}

/** Seconds to the first token, as this browser saw them. */
export function firstTokenS(answer: Answer): number | null {
  return answer.firstAt === null ? null : (answer.firstAt - answer.begunAt) / 1000
}

/** Tokens a second behind the first one, as this browser saw them. */
export function tokensPerS(answer: Answer): number | null {
  if (answer.firstAt === null || answer.lastAt === null || answer.lastAt <= answer.firstAt) return null
  return ((answer.tokens.length - 1) * 1000) / (answer.lastAt - answer.firstAt)
}

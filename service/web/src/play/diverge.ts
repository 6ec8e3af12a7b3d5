/** Where an answer leaves another, by token ids: equal text may be of different tokens, and the reverse. */

export interface Piece {
  text: string
  tokens: number // how many tokens it came with
}

export type Divergence =
  | { kind: "none" } // nothing to compare yet
  | { kind: "same"; whole: boolean } // so far, or to the end of both
  | { kind: "from"; token: number; ended: boolean } // the first token that differs, from 0; ended: this one stops there

export function divergence(own: Answer, reference: Answer): Divergence {
  const shorter = Math.min(own.tokens.length, reference.tokens.length)
  for (let i = 0; i < shorter; i++) {
    if (own.tokens[i] !== reference.tokens[i]) return { kind: "from", token: i, ended: false }
  }
  if (own.ended && reference.tokens.length > shorter) return { kind: "from", token: shorter, ended: true }
  if (reference.ended && own.tokens.length > shorter) return { kind: "from", token: shorter, ended: false }
  if (shorter === 0) return { kind: "none" }
  return { kind: "same", whole: own.ended && reference.ended }
}

interface Answer {
  tokens: readonly number[]
  ended: boolean // by itself: a stream that was stopped may have gone on
}

/** How many characters come before a token. Text that was held back comes with the token that let it go. */
export function charactersBefore(pieces: readonly Piece[], token: number): number {
  let tokens = 0
  let characters = 0
  for (const piece of pieces) {
    if (tokens + piece.tokens > token) break
    tokens += piece.tokens
    characters += piece.text.length
  }
  return characters
}

/** In words, for the badge over an answer; tokens are counted from 1. */
export function wordsOf(found: Divergence): string {
  if (found.kind === "none") return ""
  if (found.kind === "same") return found.whole ? "same tokens" : "same so far"
  return found.ended ? `ends before token ${found.token + 1}` : `differs from token ${found.token + 1}`
}

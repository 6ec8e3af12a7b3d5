/** A column's text as it comes, marked from the first token on that is not the reference's. */

import type { Answer } from "../../play/answer.ts"
import { charactersBefore, divergence, wordsOf } from "../../play/diverge.ts"
import type { Divergence } from "../../play/diverge.ts"

interface Props {
  title: string // what the column runs with now
  answer: Answer | undefined
  reference: Answer | null | undefined // null: this is the reference itself
}

export function AnswerText({ title, answer, reference }: Props) {
  if (answer === undefined) return <div class="answer faint">Nothing was asked yet.</div>
  const found = reference ? divergence(ended(answer), ended(reference)) : null
  return (
    <div class="answer" aria-busy={answer.status === "waiting" || answer.status === "streaming"}>
      {answer.of !== title && (
        <p class="compared faint">The answer of {answer.of}; run again for the new choice.</p>
      )}
      <Badge found={found} reference={reference === null} />
      {answer.status === "waiting" && <p class="faint waiting">Waiting for the first token…</p>}
      {answer.text !== "" && <Text answer={answer} found={found} />}
      {answer.status === "done" && answer.text === "" && (
        <p class="faint">It ended at once, without any text.</p>
      )}
      {answer.status === "stopped" && <p class="faint">Stopped.</p>}
      {answer.error !== null && (
        <p class="refusal">
          {answer.error.message}
          {answer.error.code !== "" && <code class="error-code">{answer.error.code}</code>}
        </p>
      )}
    </div>
  )
}

const ended = (answer: Answer) => ({ tokens: answer.tokens, ended: answer.finish !== null })

function Badge({ found, reference }: { found: Divergence | null; reference: boolean }) {
  if (reference) return <p class="compared faint">the reference</p>
  const words = found === null ? "" : wordsOf(found)
  return <p class={found?.kind === "from" ? "compared differs" : "compared faint"}>{words || "\u00a0"}</p>
}

function Text({ answer, found }: { answer: Answer; found: Divergence | null }) {
  if (found?.kind !== "from") return <div class="text">{answer.text}</div>
  const at = charactersBefore(answer.pieces, found.token)
  return (
    <div class="text">
      <span class="same">{answer.text.slice(0, at)}</span>
      <span class="caret" aria-label={wordsOf(found)} role="img" title={wordsOf(found)}>
        {found.token + 1}
      </span>
      {at < answer.text.length && <mark>{answer.text.slice(at)}</mark>}
    </div>
  )
}

/** How an answer came: its speed as this browser saw it, the server's own timing, and what ran. */

import type { ComponentChildren } from "preact"
import { count, seconds, shortDigest } from "../../format.ts"
import { firstTokenS, tokensPerS } from "../../play/answer.ts"
import type { Answer } from "../../play/answer.ts"
import { short } from "../../format.ts"

export function Facts({ answer }: { answer: Answer | undefined }) {
  const first = answer ? firstTokenS(answer) : null
  const rate = answer ? tokensPerS(answer) : null
  return (
    <dl class="answer-facts">
      <Fact name="Tokens">{answer ? count(answer.tokens.length) : "–"}</Fact>
      <Fact name="Speed">{rate === null ? "–" : `${short(rate)} tokens/s`}</Fact>
      <Fact name="First token">{first === null ? "–" : seconds(first)}</Fact>
      <Fact name="Ended by">{answer?.finish ?? "–"}</Fact>
      <Fact name="Server">
        {answer?.timing
          ? `first ${seconds(answer.timing.first_token_s)}, total ${seconds(answer.timing.total_s)}, queued ${seconds(answer.timing.queue_s)}`
          : "–"}
      </Fact>
      <Fact name="Ran">
        <Ran ran={answer?.ran} />
        {answer?.seed != null && answer.ran && <span class="faint"> · seed {answer.seed}</span>}
      </Fact>
    </dl>
  )
}

function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  )
}

/** The digests that ran, and in which mode. */
export function Ran({ ran }: { ran: Answer["ran"] }) {
  if (ran === null || ran === undefined) return <>–</>
  return (
    <>
      {ran.adapters.length === 0 && "base"}
      {ran.adapters.map(({ name, digest, weight }, i) => (
        <span key={i} title={`${name} ${digest}`}>
          {i > 0 && " + "}
          <code>{shortDigest(digest)}</code>
          {(ran.adapters.length > 1 || weight !== 1) && ` × ${weight}`}
        </span>
      ))}
      <span class="faint"> · {ran.mode}</span>
    </>
  )
}

/** How a run ended, said once for those who do not see the columns. */

import { answers, running } from "../../play/run.ts"
import { divergence, wordsOf } from "../../play/diverge.ts"
import { titleOf } from "../../play/setup.ts"
import { setup } from "../../play/state.ts"

export function Summary() {
  return (
    <p class="offscreen" role="status">
      {running.value ? "Running." : sentences()}
    </p>
  )
}

function sentences(): string {
  const reference = answers.value.get(setup.value.reference)
  return setup.value.columns
    .flatMap((column, i) => {
      const answer = answers.value.get(column.id)
      if (answer === undefined) return []
      const how = answer.error?.message ?? `${answer.tokens.length} tokens, ${answer.finish ?? "stopped"}`
      const compared =
        reference && reference !== answer
          ? wordsOf(
              divergence(
                { tokens: answer.tokens, ended: answer.finish !== null },
                { tokens: reference.tokens, ended: reference.finish !== null },
              ),
            )
          : ""
      return [`Column ${"ABCDEF"[i] ?? "?"}, ${titleOf(column)}: ${how}${compared && `, ${compared}`}.`]
    })
    .join(" ")
}

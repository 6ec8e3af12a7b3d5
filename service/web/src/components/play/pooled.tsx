/** What classifiers and encoders answer: bars of labels a text, or how alike each two texts are. */

import { count, seconds } from "../../format.ts"
import type { Classified, Pooled } from "../../play/pooled.ts"
import { Ran } from "./facts.tsx"

export function PooledAnswer({ answer }: { answer: Pooled | undefined }) {
  if (answer === undefined) return <div class="answer faint">Nothing was asked yet.</div>
  if (answer.status === "waiting") return <div class="answer faint">Waiting…</div>
  if (answer.status === "stopped") return <div class="answer faint">Stopped.</div>
  if (answer.status === "failed") {
    return (
      <div class="answer">
        <p class="refusal">
          {answer.message}
          {answer.code !== "" && <code class="error-code">{answer.code}</code>}
        </p>
      </div>
    )
  }
  return (
    <div class="answer">
      {answer.classes?.map((found, i) => (
        <Bars key={i} text={answer.texts[i] ?? ""} found={found} />
      ))}
      {answer.cosines && <Matrix texts={answer.texts} cosines={answer.cosines} />}
      <p class="faint">
        {count(answer.tokens)} tokens · {seconds(answer.seconds)}
        {answer.dimensions !== undefined && ` · ${count(answer.dimensions)} dimensions`}
        {answer.ran && (
          <>
            {" · "}
            <Ran ran={answer.ran} />
          </>
        )}
      </p>
    </div>
  )
}

/** The server names only the winning label; the others go by their number. */
function Bars({ text, found }: { text: string; found: Classified }) {
  const best = found.probs.indexOf(Math.max(...found.probs))
  return (
    <table class="label-bars">
      <caption>{text}</caption>
      <tbody>
        {found.probs.map((prob, i) => (
          <tr key={i} class={i === best ? "best" : ""}>
            <th scope="row">{i === best && found.label !== null ? found.label : `label ${i}`}</th>
            <td>
              <div class="prob" style={{ width: `${Math.min(1, Math.max(0, prob)) * 100}%` }} />
            </td>
            <td class="number">{prob.toFixed(3)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  )
}

function Matrix({ texts, cosines }: { texts: string[]; cosines: number[][] }) {
  return (
    <>
      <div class="scrolls">
        <table class="cosines">
          <caption>Cosine similarity</caption>
          <thead>
            <tr>
              <td />
              {texts.map((text, i) => (
                <th key={i} scope="col" title={text}>
                  {i + 1}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {cosines.map((row, i) => (
              <tr key={i}>
                <th scope="row" title={texts[i]}>
                  {i + 1}
                </th>
                {row.map((value, j) => (
                  <td key={j} style={{ "--share": `${Math.round(Math.max(0, value) * 45)}%` }}>
                    {value.toFixed(3)}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <ol class="text-list">
        {texts.map((text, i) => (
          <li key={i}>{text}</li>
        ))}
      </ol>
    </>
  )
}

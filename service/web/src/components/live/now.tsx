/** The server at this moment, in a few numbers. */

import { count, short } from "../../format.ts"
import { moments, trouble } from "../../live/poll.ts"
import { rates } from "../../live/ring.ts"

export function Now() {
  const last = moments.value.at(-1)
  if (last === undefined) return <p class="faint">Asking the server…</p>
  const rate = rates(moments.value.slice(-2), (stats) => stats.completion_tokens).at(-1) ?? null
  const facts: [string, string][] = [
    ["State", last.state],
    ["Up", uptime(last.uptime_s)],
    ["Running", shown(last.running, count)],
    ["Waiting", shown(last.queue_depth, count)],
    ["Adapters in the batch", shown(last.distinct_adapters, count)],
    ["Tokens/s", last.completion_tokens === null ? HIDDEN : shownRate(rate)],
    ["Tokens generated", shown(last.completion_tokens, count)],
  ]
  return (
    <>
      {trouble.value !== null && (
        <p class="refusal" role="alert">
          {trouble.value} The charts go on when it answers again.
        </p>
      )}
      <dl class="now-facts card">
        {facts.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd class={value === HIDDEN ? "faint" : ""}>{value}</dd>
          </div>
        ))}
      </dl>
    </>
  )
}

const HIDDEN = "not shown to this key"

const shown = (value: number | null, format: (value: number) => string): string =>
  value === null ? HIDDEN : format(value)

const shownRate = (rate: number | null): string => (rate === null ? "–" : short(rate))

function uptime(passed: number): string {
  const minutes = Math.floor(passed / 60)
  if (minutes < 1) return `${Math.floor(passed)} s`
  if (minutes < 60) return `${minutes} min`
  const hours = Math.floor(minutes / 60)
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`
}

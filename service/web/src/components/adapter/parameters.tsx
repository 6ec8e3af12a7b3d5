/** What an adapter's parameters are, drawn against those of plain LoRA. */

import { useEffect, useState } from "preact/hooks"
import type { Parameters } from "../../api.ts"
import { compression, count } from "../../format.ts"
import { client } from "../../state.ts"

interface Bar {
  label: string
  parts: { what: string; kind: string; params: number }[]
}

export function ParameterCounts({ name, digest }: { name: string; digest: string }) {
  const [counted, setCounted] = useState<Parameters | null>(null)
  const [refused, setRefused] = useState<string | null>(null)
  useEffect(() => {
    let current = true
    client.value.parameters(name).then(
      (answer) => current && setCounted(answer),
      (error: Error) => current && setRefused(error.message),
    )
    return () => {
      current = false
    }
  }, [name, digest])
  return (
    <section class="card params-card" aria-labelledby="params-title">
      <h2 id="params-title">Parameters</h2>
      {refused !== null && <p class="refusal">{refused}</p>}
      {counted !== null && <Bars counted={counted} />}
    </section>
  )
}

function Bars({ counted }: { counted: Parameters }) {
  const bars = barsOf(counted)
  const most = Math.max(...bars.map(total), 1)
  const saving = compression(counted.lora_params, counted.vblora_params)
  return (
    <>
      <p class="explain">
        {saving === null
          ? "A plain LoRA adapter: it has no vector bank."
          : `${saving} fewer parameters than plain LoRA of rank ${counted.r}.`}
      </p>
      <table class="bars">
        <thead class="hidden">
          <tr>
            <th scope="col">Form</th>
            <th scope="col">Parameters</th>
          </tr>
        </thead>
        <tbody>
          {bars.map((bar) => (
            <tr key={bar.label}>
              <th scope="row">
                {bar.label}
                <span class="number">{count(total(bar))}</span>
              </th>
              <td>
                <span class="track">
                  {bar.parts.map(({ what, kind, params }) => (
                    <span
                      key={what}
                      class={`part ${kind}`}
                      title={`${what}: ${count(params)}`}
                      style={{ width: `${(100 * params) / most}%` }}
                    />
                  ))}
                </span>
                <span class="legend">
                  {bar.parts.length > 1 &&
                    bar.parts.map(({ what, kind, params }) => (
                      <span key={what}>
                        <span class={`key ${kind}`} aria-hidden="true" /> {what} {count(params)}
                      </span>
                    ))}
                </span>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      <p class="faint summary">{counted.summary}</p>
    </>
  )
}

const total = (bar: Bar): number => bar.parts.reduce((sum, { params }) => sum + params, 0)

function barsOf(counted: Parameters): Bar[] {
  const { vector_bank_params: bank, vblora_params: own, full_logits_params: full } = counted
  const other = { what: "saved modules", kind: "other", params: counted.other_params }
  const lora = {
    label: `Plain LoRA, rank ${counted.r}`,
    parts: [{ what: "factors", kind: "lora", params: counted.lora_params }],
  }
  const withOther = (bar: Bar): Bar => (other.params > 0 ? { ...bar, parts: [...bar.parts, other] } : bar)
  if (bank === null || own === null || full === null) return [withOther(lora)]
  const made = (label: string, mixture: string, params: number): Bar =>
    withOther({
      label,
      parts: [
        { what: "bank", kind: "bank", params: bank },
        { what: mixture, kind: "mixture", params: params - bank },
      ],
    })
  if (counted.storage === "logits") return [made("This adapter, with full logits", "logits", own), lora]
  return [
    made("This adapter", "top-k indices and weights", own),
    made("With full logits, as trained", "logits", full),
    lora,
  ]
}

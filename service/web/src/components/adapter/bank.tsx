/** How an adapter uses its vector bank: the picture, the vectors that are used most, and the same in words. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks"
import type { BankUsage } from "../../api.ts"
import { count } from "../../format.ts"
import { columnsFor, heatOf, labelWidth, largest, percent, rowSize, vectorsOf } from "../../heat.ts"
import type { Heat } from "../../heat.ts"
import { client } from "../../state.ts"
import { HeatMap } from "./heat-map.tsx"

const MOST_USED = 8
const IN_WORDS = 3

export function Bank({ name, digest }: { name: string; digest: string }) {
  const box = useRef<HTMLDivElement>(null)
  const [width, setWidth] = useState(0)
  const [usage, setUsage] = useState<BankUsage | null>(null)
  const [refused, setRefused] = useState<string | null>(null)
  const columns = width > 0 ? columnsFor(width - labelWidth(width, Infinity)) : 0

  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => {
      setWidth(Math.max(200, Math.floor(entry?.contentRect.width ?? 0)))
    })
    if (box.current) observer.observe(box.current)
    return () => observer.disconnect()
  }, [])
  useEffect(() => {
    if (columns === 0) return undefined
    let current = true
    client.value.bank(name, columns).then(
      (answer) => {
        if (!current) return
        setUsage(answer)
        setRefused(null)
      },
      (error: Error) => current && setRefused(error.message),
    )
    return () => {
      current = false
    }
  }, [name, digest, columns])

  return (
    <section class="card bank-use" aria-labelledby="bank-title">
      <h2 id="bank-title">The bank, and who uses it</h2>
      <div ref={box}>
        {refused !== null && <p class="refusal">{refused}</p>}
        {usage === null && refused === null && <p class="faint loading">Loading…</p>}
        {usage !== null && <Usage usage={usage} width={width} />}
      </div>
    </section>
  )
}

function Usage({ usage, width }: { usage: BankUsage; width: number }) {
  const heat = useMemo(() => heatOf(usage), [usage])
  const labels = labelWidth(width, rowSize(heat.rows.length))
  return (
    <>
      <p class="explain">
        {usedOf(usage)} Each row is one side of a layer, each column{" "}
        {usage.vectors_per_column === 1 ? "a vector" : `${usage.vectors_per_column} vectors`}; the stronger
        the colour, the more of the row's weight lies there.
      </p>
      <HeatMap usage={usage} heat={heat} width={width - labels} labels={labels} />
      <Scale most={heat.most} labels={labels} />
      <MostUsed usage={usage} heat={heat} />
      <InWords usage={usage} />
    </>
  )
}

function usedOf({ used_vectors, unused_vectors, num_vectors }: BankUsage): string {
  if (unused_vectors === 0) return `All ${count(num_vectors)} vectors are used.`
  return `${count(used_vectors)} of ${count(num_vectors)} vectors are used, ${count(unused_vectors)} by no layer.`
}

function Scale({ most, labels }: { most: number; labels: number }) {
  return (
    <p class="scale faint" style={{ paddingLeft: `${labels}px` }}>
      none <span class="ramp" aria-hidden="true" /> {percent(most)}
    </p>
  )
}

function MostUsed({ usage, heat }: { usage: BankUsage; heat: Heat }) {
  const top = largest(heat.totals, MOST_USED)
  const first = top[0]?.share ?? 1
  return (
    <>
      <h3>Used most</h3>
      <table class="most-used">
        <thead>
          <tr>
            <th scope="col">{usage.vectors_per_column === 1 ? "Vector" : "Vectors"}</th>
            <th scope="col">Share of all layers' weight</th>
          </tr>
        </thead>
        <tbody>
          {top.map(({ column, share }) => (
            <tr key={column}>
              <th scope="row">{vectorsOf(column, usage).replace(/^vectors? /, "")}</th>
              <td>
                <span class="share">
                  <span class="fill" style={{ width: `${(100 * share) / first}%` }} />
                </span>
                {percent(share)}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </>
  )
}

/** What the picture shows, for those who cannot see it. */
function InWords({ usage }: { usage: BankUsage }) {
  const [open, setOpen] = useState(false)
  const words = (shares: readonly number[]) =>
    largest(shares, IN_WORDS)
      .map(({ column, share }) => `${vectorsOf(column, usage).replace(/^vectors? /, "")} (${percent(share)})`)
      .join(", ")
  return (
    <details onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>The same as a table</summary>
      {open && (
        <div class="wide">
          <table class="plain in-words">
            <caption class="hidden">The vectors that each layer uses most</caption>
            <thead>
              <tr>
                <th scope="col">Layer</th>
                <th scope="col">Side A uses most</th>
                <th scope="col">Side B uses most</th>
              </tr>
            </thead>
            <tbody>
              {usage.layers.map(({ name, A, B }) => (
                <tr key={name}>
                  <th scope="row">{name}</th>
                  <td>{words(A)}</td>
                  <td>{words(B)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </details>
  )
}

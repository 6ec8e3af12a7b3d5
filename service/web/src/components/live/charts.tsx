/** The charts, each of what it shows; one that this key may not see says so in its place. */

import type { Stats } from "../../api.ts"
import { bytes, count, seconds, short } from "../../format.ts"
import { moments } from "../../live/poll.ts"
import { FOREIGN, OTHERS, rates, readings, shares } from "../../live/ring.ts"
import { Slots } from "../../live/slots.ts"
import { Chart } from "./chart.tsx"
import type { Series, Size } from "./chart.tsx"

const MOST_NAMED = 8
const UNNAMED: Record<string, number> = { [OTHERS]: 9, [FOREIGN]: 10 }
const slots = new Slots(MOST_NAMED)

const times = () => moments.value.map(({ time }) => time)
const rows = (value: number): string => count(value)

export function Requests() {
  const last = moments.value.at(-1)
  if (last?.running === null) return <Hidden title="Requests" />
  const series: Series[] = [
    { name: "Running", slot: 1, values: readings(moments.value, ({ running }) => running) },
    { name: "Waiting", slot: 3, values: readings(moments.value, ({ queue_depth }) => queue_depth) },
  ]
  const { max_batch_size, max_queue } = last?.limits ?? { max_batch_size: 0, max_queue: 0 }
  const note = `At most ${count(max_batch_size)} run at once and ${count(max_queue)} wait.`
  return <Chart title="Requests" times={times()} series={series} format={rows} whole note={note} />
}

export function Batch() {
  const found = shares(moments.value, MOST_NAMED)
  const named = [...found.keys()].filter((name) => name !== FOREIGN && name !== OTHERS)
  const held = slots.assign(named)
  const order = [...named.sort((a, b) => (held.get(a) ?? 0) - (held.get(b) ?? 0)), OTHERS, FOREIGN]
  const series: Series[] = order.flatMap((name) => {
    const values = found.get(name)
    return values === undefined
      ? []
      : [{ name, slot: held.get(name) ?? UNNAMED[name] ?? 9, values, area: true }]
  })
  const own = moments.value.at(-1)?.running === null
  const note = own
    ? "Only this key's own requests: those of others are not shown to it."
    : series.length === 0
      ? "Nothing ran in the last five minutes."
      : undefined
  return (
    <Chart
      title="Batch by adapter"
      times={times()}
      series={series}
      format={rows}
      whole
      size="whole"
      {...(note !== undefined && { note })}
    />
  )
}

export function Tokens() {
  if (moments.value.at(-1)?.completion_tokens === null) return <Hidden title="Tokens per second" />
  const series: Series[] = [
    { name: "Generated", slot: 1, values: rates(moments.value, (stats) => stats.completion_tokens) },
    { name: "Read (prompts)", slot: 2, values: rates(moments.value, (stats) => stats.prompt_tokens) },
    {
      name: "of those, from the cache",
      slot: 5,
      values: rates(moments.value, (stats) => stats.cached_tokens),
    },
  ]
  return <Chart title="Tokens per second" times={times()} series={series} format={short} />
}

interface LatencyProps {
  title: string
  of: "first_token_s" | "inter_token_s" | "total_s"
}

export function Latency({ title, of }: LatencyProps) {
  if (moments.value.at(-1)?.latency === null) return <Hidden title={title} size="third" />
  const series: Series[] = [
    {
      name: "p50, the median",
      slot: 1,
      values: readings(moments.value, (stats) => stats.latency?.[of].p50 ?? null),
    },
    {
      name: "p95",
      slot: 3,
      values: readings(moments.value, (stats) => stats.latency?.[of].p95 ?? null),
    },
  ]
  return (
    <Chart
      title={title}
      times={times()}
      series={series}
      format={seconds}
      axis={span}
      size="third"
      note="Of the last 60 seconds."
    />
  )
}

function span(value: number, top: number): string {
  return top < 1 ? `${Number((value * 1000).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`
}

export function Memory() {
  const last = moments.value.at(-1)
  if (last?.memory === null) return <Hidden title="Memory" size="whole" />
  const read = (pick: (memory: NonNullable<Stats["memory"]>) => number | null) =>
    readings(moments.value, ({ memory }) => (memory === null ? null : pick(memory)))
  const all: Series[] = [
    { name: "Base weights", slot: 1, values: read((memory) => memory.weight_bytes), area: true },
    {
      name: "Adapters, compact",
      slot: 2,
      values: read((memory) => memory.adapter_compact_bytes),
      area: true,
    },
    {
      name: "Adapters, composed",
      slot: 3,
      values: read((memory) => memory.adapter_factor_bytes),
      area: true,
    },
    { name: "Keys and values", slot: 4, values: read((memory) => memory.kv_bytes), area: true },
    { name: "Prefix cache", slot: 5, values: read((memory) => memory.prefix_bytes), area: true },
    { name: "Whole process", slot: 6, values: read((memory) => memory.process_bytes) },
    { name: "Device, reserved", slot: 7, values: read((memory) => memory.device_bytes) },
  ]
  const series = all.filter(({ values }) => values.some((value) => value !== null))
  const budget = last?.memory ? `Keys and values may take up to ${bytes(last.memory.kv_budget_bytes)}.` : ""
  return <Chart title="Memory" times={times()} series={series} format={bytes} size="whole" note={budget} />
}

function Hidden({ title, size = "half" }: { title: string; size?: Size }) {
  return (
    <section class={`card chart ${size}`}>
      <h2>{title}</h2>
      <p class="faint">
        Not shown to this key: it is about everybody's requests. With <code>--metrics-public</code> the server
        shows it to all.
      </p>
    </section>
  )
}

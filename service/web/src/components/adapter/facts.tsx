/** All that is known of an adapter, in pairs. */

import type { ComponentChildren } from "preact"
import type { AdapterDetail } from "../../api.ts"
import { ago, bytes, count } from "../../format.ts"
import { State } from "../badges.tsx"
import { Digest } from "../digest.tsx"

const STORAGE = { topk: "compact (top-k)", logits: "full logits", lora: "plain LoRA" }

export function Facts({ adapter }: { adapter: AdapterDetail }) {
  const { num_vectors, vector_length, topk } = adapter
  return (
    <section class="card" aria-labelledby="facts-title">
      <h2 id="facts-title">Facts</h2>
      <dl class="facts">
        <Fact name="State">
          <State adapter={adapter} />
          {adapter.reason !== null && <p class="refusal">{adapter.reason}</p>}
        </Fact>
        <Fact name="Digest">
          <Digest digest={adapter.digest} whole />
        </Fact>
        <Fact name="Base">{adapter.base}</Fact>
        <Fact name="Rank">{adapter.r}</Fact>
        <Fact name="Bank">
          {num_vectors === null
            ? "none: it is plain LoRA"
            : `${count(num_vectors)} vectors of length ${vector_length}, top ${topk} mixed`}
        </Fact>
        <Fact name="Stored as">{STORAGE[adapter.storage]}</Fact>
        <Fact name="On disk">{bytes(adapter.file_bytes)}</Fact>
        <Fact name="In memory">
          {adapter.resident_bytes > 0 ? bytes(adapter.resident_bytes) : "nothing now"}
        </Fact>
        <Fact name="Created">
          <Time time={adapter.created_at} />
        </Fact>
        <Fact name="Updated">
          <Time time={adapter.updated_at} />
        </Fact>
        <Fact name="Last use">
          {adapter.last_used === null ? "never" : <Time time={adapter.last_used} />}
        </Fact>
        <Fact name="Requests">{count(adapter.requests)} since the server's start</Fact>
        <Fact name="Running now">{adapter.pins === 0 ? "no request" : `held by ${count(adapter.pins)}`}</Fact>
        <Fact name="Training">
          {adapter.resumable ? "can go on from these files" : "cannot go on from these files"}
        </Fact>
        <Fact name="Seen by">{adapter.shared ? "every tenant" : "its own tenant"}</Fact>
      </dl>
    </section>
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

export function Time({ time }: { time: number }) {
  const date = new Date(time * 1000)
  return (
    <time dateTime={date.toISOString()} title={date.toLocaleString()}>
      {ago(time, Date.now() / 1000)}
    </time>
  )
}

/** The adapters in rows, sorted by any column; a card each on a narrow screen. */

import type { Adapter } from "../../api.ts"
import { ago, bytes, compression, count } from "../../format.ts"
import { nextOrder, savedParams } from "../../sorting.ts"
import type { Column } from "../../sorting.ts"
import { adapters, whoAmI } from "../../state.ts"
import { Badges, State } from "../badges.tsx"
import { Digest } from "../digest.tsx"
import { order, rows, turnTo } from "./list.ts"
import { RowActions } from "./row-actions.tsx"

const COLUMNS: readonly [Column, string, string][] = [
  ["name", "Name", ""],
  ["digest", "Digest", ""],
  ["rank", "Rank", "The rank of its low-rank updates"],
  ["bank", "Bank", "Vectors in the bank × their length, and how many of them are mixed (top-k)"],
  ["targets", "Layers", "How many of the base's layers are adapted"],
  ["params", "Parameters", "To be saved, in float32-equivalents"],
  ["disk", "On disk", ""],
  ["compression", "Saving", "How many times fewer parameters than plain LoRA of the same rank has"],
  ["state", "State", ""],
  ["requests", "Requests", "Since the server's start"],
  ["used", "Last use", ""],
]

export const columnLabels = COLUMNS.map(([column, label]) => [column, label] as const)

export function AdapterTable() {
  return (
    <table class="adapters" aria-rowcount={adapters.value.length + 1}>
      <caption class="hidden">Adapters</caption>
      <thead>
        <tr>
          {COLUMNS.map(([column, label, meaning]) => (
            <Heading key={column} column={column} label={label} meaning={meaning} />
          ))}
          <th scope="col" class="do">
            <span class="hidden">Actions</span>
          </th>
        </tr>
      </thead>
      <tbody>
        {rows.value.map((adapter) => (
          <Row key={adapter.name} adapter={adapter} />
        ))}
      </tbody>
    </table>
  )
}

function Heading({ column, label, meaning }: { column: Column; label: string; meaning: string }) {
  const { column: by, down } = order.value
  const direction = by === column ? (down ? "descending" : "ascending") : undefined
  const sort = () => {
    order.value = nextOrder(order.value, column)
    turnTo(0)
  }
  return (
    <th scope="col" class={column} aria-sort={direction}>
      <button type="button" class="quiet" onClick={sort} title={meaning || undefined}>
        {label}
        <svg class="sort" viewBox="0 0 8 8" width="8" height="8" aria-hidden="true">
          {direction && <path d={down ? "M0 2h8L4 7z" : "M0 6h8L4 1z"} />}
        </svg>
      </button>
    </th>
  )
}

function Row({ adapter }: { adapter: Adapter }) {
  const { name, num_vectors, vector_length, topk } = adapter
  const saving = compression(adapter.lora_params, adapter.vblora_params)
  return (
    <tr class={adapter.active ? "is-active" : ""} data-name={name}>
      <th scope="row" class="name">
        <a href={`#/adapters/${encodeURIComponent(name)}`} title={name}>
          {name}
        </a>
        <span class="badges">
          <Badges adapter={adapter} tenant={whoAmI.value?.tenant ?? ""} />
        </span>
      </th>
      <td class="digest" data-label="Digest">
        <Digest digest={adapter.digest} />
      </td>
      <td class="rank" data-label="Rank">
        {adapter.r}
      </td>
      <td class="bank" data-label="Bank">
        {num_vectors === null ? (
          "plain LoRA"
        ) : (
          <>
            {num_vectors} × {vector_length} <span class="faint">top {topk}</span>
          </>
        )}
      </td>
      <td class="targets" data-label="Layers">
        {count(adapter.target_modules)}
      </td>
      <td class="params" data-label="Parameters">
        {count(savedParams(adapter))}
      </td>
      <td class="disk" data-label="On disk">
        {bytes(adapter.file_bytes)}
      </td>
      <td class="compression" data-label="Saving">
        {saving ?? <span class="faint">–</span>}
      </td>
      <td class="state" data-label="State">
        <State adapter={adapter} />
        {adapter.reason !== null && <span class="reason">{adapter.reason}</span>}
      </td>
      <td class="requests" data-label="Requests">
        {count(adapter.requests)}
      </td>
      <td class="used" data-label="Last use">
        {adapter.last_used === null ? (
          <span class="faint">never</span>
        ) : (
          ago(adapter.last_used, Date.now() / 1000)
        )}
      </td>
      <td class="do">
        <RowActions adapter={adapter} />
      </td>
    </tr>
  )
}

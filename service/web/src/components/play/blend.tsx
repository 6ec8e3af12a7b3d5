/** A blend's rows: an adapter and its weight each, on a slider and in a box. */

import type { ComponentChildren } from "preact"
import type { WeightedName } from "../../api.ts"
import { adapters } from "../../state.ts"
import { NumberBox } from "../number.tsx"
import { Picker } from "./picker.tsx"

interface Props {
  title: string // the column's, for labels
  rows: WeightedName[]
  onChange: (rows: WeightedName[]) => void
  children: ComponentChildren // beside the button that adds
}

export function Blend({ title, rows, onChange, children }: Props) {
  const change = (at: number, changed: Partial<WeightedName>) =>
    onChange(rows.map((row, i) => (i === at ? { ...row, ...changed } : row)))
  const add = () => {
    const taken = new Set(rows.map(({ name }) => name))
    const next = adapters.value.find(({ name }) => !taken.has(name))
    onChange([...rows, { name: next?.name ?? "", weight: 1 }])
  }
  return (
    <div class="blend-rows">
      {rows.map((row, i) => (
        <Row
          key={i}
          title={`${title}, adapter ${i + 1}`}
          row={row}
          onChange={(changed) => change(i, changed)}
          onRemove={() => onChange(rows.filter((_, j) => j !== i))}
        />
      ))}
      <div class="row">
        <button type="button" class="small" onClick={add}>
          + Add an adapter
        </button>
        {children}
      </div>
    </div>
  )
}

interface RowProps {
  title: string
  row: WeightedName
  onChange: (changed: Partial<WeightedName>) => void
  onRemove: () => void
}

function Row({ title, row, onChange, onRemove }: RowProps) {
  return (
    <div class="blend-row" role="group" aria-label={title}>
      <Picker label={title} value={row.name} onPick={(name) => onChange({ name })} />
      <NumberBox
        step={0.05}
        value={row.weight}
        label={`Weight of ${title}, as a number`}
        onNumber={(weight) => weight !== null && onChange({ weight })}
      />
      <button type="button" class="quiet small" aria-label={`Remove ${title}`} onClick={onRemove}>
        ×
      </button>
      <div class="slider">
        <input
          type="range"
          min="-2"
          max="2"
          step="0.05"
          value={row.weight}
          aria-label={`Weight of ${title}`}
          onInput={(event) => onChange({ weight: event.currentTarget.valueAsNumber })}
        />
        <span class="zero" aria-hidden="true" />
      </div>
    </div>
  )
}

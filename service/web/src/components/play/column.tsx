/** One column: what it runs with, what was answered, and how that compares. */

import { whoAmI } from "../../state.ts"
import { answers, pooled } from "../../play/run.ts"
import { titleOf } from "../../play/setup.ts"
import type { Column } from "../../play/setup.ts"
import { change, removeColumn, setReference, setup, toBlend } from "../../play/state.ts"
import { Actions } from "./actions.tsx"
import { AnswerText } from "./answer.tsx"
import { Blend } from "./blend.tsx"
import { Facts } from "./facts.tsx"
import { Picker } from "./picker.tsx"
import { PooledAnswer } from "./pooled.tsx"
import { Save } from "./save.tsx"

export function ColumnCard({ column, letter }: { column: Column; letter: string }) {
  const name = `column ${letter}`
  const task = whoAmI.value?.task
  const pools = task === "classify" || task === "embed"
  const answer = answers.value.get(column.id)
  const reference = answers.value.get(setup.value.reference)
  return (
    <section class="card column" aria-label={`Column ${letter}: ${titleOf(column)}`}>
      <Head column={column} letter={letter} compares={!pools} />
      <div class="runs">
        {column.kind === "one" ? (
          <Picker
            label={`Adapter of ${name}`}
            value={column.name}
            base
            onPick={(chosen) => change(column.id, { name: chosen })}
          />
        ) : (
          <Blend title={name} rows={column.blend} onChange={(blend) => change(column.id, { blend })}>
            <Save column={column} title={name} />
          </Blend>
        )}
      </div>
      {pools ? (
        <PooledAnswer answer={pooled.value.get(column.id)} />
      ) : (
        <AnswerText
          title={titleOf(column)}
          answer={answer}
          reference={column.id === setup.value.reference ? null : reference}
        />
      )}
      <footer>
        {!pools && <Facts answer={answer} />}
        <Actions column={column} name={name} text={pools ? undefined : answer?.text} />
      </footer>
    </section>
  )
}

function Head({ column, letter, compares }: { column: Column; letter: string; compares: boolean }) {
  const only = setup.value.columns.length === 1
  return (
    <header class="row">
      <h2 class="letter">{letter}</h2>
      <div class="kinds" role="group" aria-label={`Column ${letter} runs with`}>
        <button
          type="button"
          class="small"
          aria-pressed={column.kind === "one"}
          onClick={() => change(column.id, { kind: "one" })}
        >
          One
        </button>
        <button
          type="button"
          class="small"
          aria-pressed={column.kind === "blend"}
          onClick={() => toBlend(column)}
        >
          Blend
        </button>
      </div>
      {compares && !only && (
        <label class="reference" title="The others are compared with this one">
          <input
            type="radio"
            name="reference"
            checked={setup.value.reference === column.id}
            onChange={() => setReference(column.id)}
          />
          reference
        </label>
      )}
      <button
        type="button"
        class="quiet small remove"
        aria-label={`Remove column ${letter}`}
        disabled={only}
        title={only ? "The last column stays." : undefined}
        onClick={() => removeColumn(column.id)}
      >
        ×
      </button>
    </header>
  )
}

/** The prompt and its options: what every column is asked. */

import { whyNoRun } from "../../rights.ts"
import { mayInfer, whoAmI } from "../../state.ts"
import { run, running, stop } from "../../play/run.ts"
import type { Options } from "../../play/setup.ts"
import { addColumn, full, linkTo, setOptions, setText, setup } from "../../play/state.ts"
import { NumberBox } from "../number.tsx"
import { take } from "./actions.tsx"

const MAC = navigator.platform.startsWith("Mac")

export function Ask() {
  const task = whoAmI.value?.task
  const pools = task === "classify" || task === "embed"
  const submit = (event: Event) => {
    event.preventDefault()
    if (mayInfer.value) void run()
  }
  return (
    <form class="card ask" noValidate onSubmit={submit}>
      <label>
        <span class="label">{pools ? "Texts, one a line" : "Prompt"}</span>
        <textarea
          class="mono"
          rows={pools ? 5 : 4}
          spellcheck={false}
          value={pools ? setup.value.texts : setup.value.prompt}
          onInput={(event) => setText(pools ? "texts" : "prompt", event.currentTarget.value)}
        />
      </label>
      <div class="options">
        {!pools && (
          <>
            <Numeric name="max_new_tokens" label="New tokens" min={1} step={1} />
            <Numeric name="temperature" label="Temperature" min={0} step={0.1} />
            <Numeric name="top_p" label="Top-p" min={0} max={1} step={0.05} empty="1" />
            <Numeric name="top_k" label="Top-k" min={0} step={1} empty="off" />
            <Numeric name="seed" label="Seed" min={0} step={1} empty="drawn" />
          </>
        )}
        <label>
          <span class="label">Mode</span>
          <select
            value={setup.value.options.mode}
            onChange={(event) =>
              setOptions({ mode: event.currentTarget.value === "merge" ? "merge" : "switch" })
            }
          >
            <option value="switch">switch</option>
            <option value="merge">merge</option>
          </select>
        </label>
      </div>
      <Buttons />
    </form>
  )
}

function Buttons() {
  const forbidden = whyNoRun()
  return (
    <div class="row">
      <button
        type="submit"
        class="primary"
        disabled={running.value || forbidden !== null}
        title={forbidden ?? undefined}
      >
        Run <kbd>{MAC ? "⌘" : "Ctrl"} ↵</kbd>
      </button>
      <button type="button" disabled={!running.value} onClick={stop}>
        Stop <kbd>Esc</kbd>
      </button>
      <span class="spring" />
      <button type="button" class="quiet" onClick={() => take(linkTo(), "The link is copied.")}>
        Copy link
      </button>
      <button
        type="button"
        disabled={full.value}
        title={full.value ? "Six columns are the most." : undefined}
        onClick={addColumn}
      >
        + Column
      </button>
    </div>
  )
}

interface NumericProps {
  name: Exclude<keyof Options, "mode">
  label: string
  min: number
  max?: number
  step: number
  empty?: string
}

/** Limits are the server's to judge, and its words to say: the steps here are only of the arrows. */
function Numeric({ name, label, min, max, step, empty }: NumericProps) {
  return (
    <label>
      <span class="label">{label}</span>
      <NumberBox
        name={name}
        min={min}
        max={max}
        step={step}
        value={setup.value.options[name]}
        placeholder={empty ?? "default"}
        onNumber={(value) => setOptions({ [name]: value })}
      />
    </label>
  )
}

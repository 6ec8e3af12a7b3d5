/** The fields that both ways of adding an adapter have. */

import type { Activation, Options } from "../../upload/form.ts"
import { nameFault } from "../../upload/files.ts"
import { exists } from "../../upload/queue.ts"

interface Props {
  id: string
  options: Options
  disabled: boolean
  change: (changes: Partial<Options>) => void
}

export function OptionFields({ id, options, disabled, change }: Props) {
  const fault = options.name === "" ? null : nameFault(options.name)
  const taken = fault === null && !options.replace && exists(options.name)
  const hint =
    fault ?? (taken ? "An adapter of this name exists: choose to replace it, or another name." : "")
  return (
    <>
      <div class="field">
        <label>
          Name
          <input
            type="text"
            value={options.name}
            disabled={disabled}
            required
            maxLength={128}
            spellcheck={false}
            autocomplete="off"
            aria-invalid={fault !== null}
            aria-describedby={`${id}-hint`}
            onInput={(event) => change({ name: event.currentTarget.value })}
          />
        </label>
        <span id={`${id}-hint`} class={fault === null ? "hint" : "hint bad"}>
          {hint}
        </span>
      </div>
      <label class="field">
        Then
        <select
          value={options.activate}
          disabled={disabled}
          onChange={(event) => change({ activate: event.currentTarget.value as Activation })}
        >
          <option value="">leave it inactive</option>
          <option value="switch">activate it</option>
          <option value="merge">activate it, merged</option>
        </select>
      </label>
      <div class="checks">
        <label title="A new version of it; the versions before can be rolled back to">
          <input
            type="checkbox"
            checked={options.replace}
            disabled={disabled}
            onChange={(event) => change({ replace: event.currentTarget.checked })}
          />
          Replace one of this name
        </label>
        <label title="Its config names the base that it was trained on; the server compares it with its own">
          <input
            type="checkbox"
            checked={options.mismatch}
            disabled={disabled}
            onChange={(event) => change({ mismatch: event.currentTarget.checked })}
          />
          Allow another base model
        </label>
      </div>
    </>
  )
}

/** A box that finds an adapter by its name: typed, arrowed, or clicked. Works the same for two adapters and for 2,000. */

import { useId, useRef, useState } from "preact/hooks"
import { count } from "../../format.ts"
import { adapters, moreAdapters } from "../../state.ts"
import { BASE_NAME } from "../../play/setup.ts"
import { found } from "../../play/find.ts"

interface Props {
  label: string
  value: string
  base?: boolean // the base model may be chosen too
  onPick: (name: string) => void
}

export function Picker({ label, value, base = false, onPick }: Props) {
  const id = useId()
  const input = useRef<HTMLInputElement>(null)
  const [typed, setTyped] = useState<string | null>(null) // null: the list is closed
  const [at, setAt] = useState(0)
  const names = [...(base ? [BASE_NAME] : []), ...adapters.value.map(({ name }) => name)]
  const { shown, left } = found(names, typed ?? "", moreAdapters.value)
  const open = typed !== null
  const current = Math.min(at, shown.length - 1)

  const show = (text: string) => {
    setTyped(text)
    setAt(text === "" ? Math.max(0, shown.indexOf(value)) : 0)
  }
  const pick = (name: string | undefined) => {
    setTyped(null)
    if (name !== undefined) onPick(name)
  }
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey) return
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault()
      const step = event.key === "ArrowDown" ? 1 : -1
      if (open) setAt((current + step + shown.length) % Math.max(1, shown.length))
      else show("")
    } else if (event.key === "Enter" && open) {
      event.preventDefault()
      pick(shown[current])
    } else if (event.key === "Escape" && open) {
      event.preventDefault() // it closes the list, and does not stop the run
      setTyped(null)
    }
  }
  return (
    <div class="picker">
      <input
        ref={input}
        role="combobox"
        aria-label={label}
        aria-expanded={open}
        aria-controls={`${id}-list`}
        aria-autocomplete="list"
        aria-activedescendant={open && shown.length > 0 ? `${id}-${current}` : undefined}
        autocomplete="off"
        spellcheck={false}
        placeholder={value || "Choose an adapter"}
        title={value}
        value={typed ?? value}
        onInput={(event) => show(event.currentTarget.value)}
        onFocus={(event) => event.currentTarget.select()}
        onClick={() => !open && show("")}
        onBlur={() => setTyped(null)}
        onKeyDown={onKeyDown}
      />
      <div class="popup" hidden={!open}>
        <ul id={`${id}-list`} role="listbox" aria-label={label}>
          {open &&
            shown.map((name, i) => (
              <Choice
                key={name}
                id={`${id}-${i}`}
                name={name}
                at={i === current}
                chosen={name === value}
                onPick={pick}
              />
            ))}
        </ul>
        {open && shown.length === 0 && <p class="faint">There are no adapters yet.</p>}
        {open && left > 0 && <p class="faint">{count(left)} more: type to narrow them down</p>}
      </div>
    </div>
  )
}

interface ChoiceProps {
  id: string
  name: string
  at: boolean
  chosen: boolean
  onPick: (name: string) => void
}

function Choice({ id, name, at, chosen, onPick }: ChoiceProps) {
  const scroll = (row: HTMLLIElement | null) => {
    if (at) row?.scrollIntoView({ block: "nearest" })
  }
  const adapter = adapters.value.find((each) => each.name === name)
  const facts =
    name === BASE_NAME && adapter === undefined
      ? "the base model"
      : [
          adapter?.active && "active",
          adapter?.state === "FAILED" && "failed",
          adapter === undefined && "as typed",
        ]
          .filter(Boolean)
          .join(", ")
  return (
    <li
      ref={scroll}
      id={id}
      role="option"
      class={at ? "at" : ""}
      aria-selected={chosen}
      // The box would lose the focus, and with it the list, before the click arrived.
      onMouseDown={(event) => event.preventDefault()}
      onClick={() => onPick(name)}
    >
      <span>{name}</span>
      {facts !== "" && <span class="faint">{facts}</span>}
    </li>
  )
}

/** A button that opens a short list of commands: arrow keys move, Escape closes, a click elsewhere too. */

import type { ComponentChildren } from "preact"
import { useId, useRef, useState } from "preact/hooks"

export interface Command {
  label: string
  run: () => void
  why?: string | null // why not
  danger?: boolean
}

const MARGIN = 8

export function Menu({
  label,
  children,
  commands,
}: {
  label: string
  children: ComponentChildren
  commands: readonly Command[]
}) {
  const id = useId()
  const button = useRef<HTMLButtonElement>(null)
  const list = useRef<HTMLDivElement>(null)
  const [open, setOpen] = useState(false)

  const place = () => {
    if (!button.current || !list.current) return
    const at = button.current.getBoundingClientRect()
    const { offsetWidth: width, offsetHeight: height } = list.current
    const below = at.bottom + 4
    const fits = below + height <= innerHeight - MARGIN
    list.current.style.left = `${Math.max(MARGIN, Math.min(at.right - width, innerWidth - width - MARGIN))}px`
    list.current.style.top = `${fits ? below : Math.max(MARGIN, at.top - height - 4)}px`
  }
  const onToggle = (event: Event) => {
    if ((event as ToggleEvent).newState !== "open") return setOpen(false)
    place()
    items(list.current)[0]?.focus()
    // What scrolls under an open list would leave it behind.
    addEventListener("scroll", () => list.current?.hidePopover(), { once: true, capture: true })
  }
  const choose = (command: Command) => {
    if (command.why) return
    list.current?.hidePopover()
    command.run()
  }
  return (
    <>
      <button
        ref={button}
        type="button"
        popovertarget={id}
        aria-haspopup="menu"
        aria-expanded={open}
        aria-label={label}
        title={label}
      >
        {children}
      </button>
      <div
        ref={list}
        id={id}
        class="menu"
        role="menu"
        aria-label={label}
        popover="auto"
        onBeforeToggle={(event: Event) => (event as ToggleEvent).newState === "open" && setOpen(true)}
        onToggle={onToggle}
        onKeyDown={(event) => move(event, list.current)}
      >
        {open &&
          commands.map((command) => (
            <button
              key={command.label}
              type="button"
              role="menuitem"
              tabIndex={-1}
              class={command.danger ? "danger" : ""}
              aria-disabled={command.why ? true : undefined}
              title={command.why ?? undefined}
              onClick={() => choose(command)}
            >
              {command.label}
            </button>
          ))}
      </div>
    </>
  )
}

const items = (list: HTMLElement | null) => [
  ...(list?.querySelectorAll<HTMLElement>("[role=menuitem]") ?? []),
]

function move(event: KeyboardEvent, list: HTMLElement | null): void {
  const all = items(list)
  const at = all.indexOf(document.activeElement as HTMLElement)
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key]
  if (event.key === "Tab") list?.hidePopover()
  if (to === undefined) return
  event.preventDefault()
  all[(to + all.length) % all.length]?.focus()
}

/** A box for a number. What is half typed ("-", "0.") stays as it is: it is overwritten only by another number. */

import { useEffect, useRef } from "preact/hooks"

interface Props {
  value: number | null
  onNumber: (value: number | null) => void // null: the box is empty, or holds no number yet
  step: number
  min?: number | undefined
  max?: number | undefined
  name?: string
  label?: string // where no <label> stands around it
  placeholder?: string
}

export function NumberBox({ value, onNumber, label, ...attributes }: Props) {
  const input = useRef<HTMLInputElement>(null)
  useEffect(() => {
    if (input.current === null || Object.is(input.current.valueAsNumber, value ?? NaN)) return
    input.current.value = value === null ? "" : String(value)
  }, [value])
  const onInput = (event: Event & { currentTarget: HTMLInputElement }) => {
    const typed = event.currentTarget.valueAsNumber
    onNumber(Number.isFinite(typed) ? typed : null)
  }
  return <input {...attributes} aria-label={label} ref={input} type="number" onInput={onInput} />
}

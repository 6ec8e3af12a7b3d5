/** Names by what was typed: those that begin with it first. */

const MOST_SHOWN = 50

export interface Found {
  shown: string[]
  left: number // more that fit, and are not shown
}

/** The typed name itself is offered too where no name is it: the page may hold only a part, and `name@sha256:…` pins. */
export function found(names: readonly string[], typed: string, partial: boolean): Found {
  const wanted = typed.trim().toLowerCase()
  const fitting = names.filter((name) => name.toLowerCase().includes(wanted))
  const first = fitting.filter((name) => name.toLowerCase().startsWith(wanted))
  const rest = fitting.filter((name) => !name.toLowerCase().startsWith(wanted))
  const asTyped =
    wanted !== "" && !names.includes(typed.trim()) && (partial || fitting.length === 0 || typed.includes("@"))
  const all = [...first, ...rest, ...(asTyped ? [typed.trim()] : [])]
  return { shown: all.slice(0, MOST_SHOWN), left: Math.max(0, all.length - MOST_SHOWN) }
}

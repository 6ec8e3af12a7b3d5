/** What the browser keeps for the page. It may keep nothing: storage can be full, or forbidden altogether. */

type Kind = "sessionStorage" | "localStorage"

export function stored(kind: Kind, key: string): string | null {
  try {
    return window[kind].getItem(key)
  } catch {
    return null
  }
}

/** null: forgets it. What cannot be kept is forgotten too, rather than left as it was before. */
export function store(kind: Kind, key: string, value: string | null): void {
  try {
    window[kind].removeItem(key)
    if (value !== null) window[kind].setItem(key, value)
  } catch {
    // It is kept as long as the page is open.
  }
}

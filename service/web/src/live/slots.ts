/** Which colour a selection has: the same for as long as it is shown, whatever comes and goes beside it. */
export class Slots {
  readonly #most: number
  readonly #held = new Map<string, number>()

  constructor(most: number) {
    this.#most = most
  }

  /** A slot (from 1) for each name; those no longer named give theirs back. At most as many names as there are slots. */
  assign(names: readonly string[]): Map<string, number> {
    const wanted = new Set(names)
    for (const name of [...this.#held.keys()]) if (!wanted.has(name)) this.#held.delete(name)
    const free = Array.from({ length: this.#most }, (_, i) => i + 1).filter(
      (slot) => ![...this.#held.values()].includes(slot),
    )
    for (const name of wanted) {
      const slot = this.#held.has(name) ? undefined : free.shift()
      if (slot !== undefined) this.#held.set(name, slot)
    }
    return new Map(this.#held)
  }
}

/** Above the table: the filter, the order where there are no headings to click, and how to turn pages. */

import { useEffect, useRef } from "preact/hooks"
import { count } from "../../format.ts"
import type { Column } from "../../sorting.ts"
import { startsDown } from "../../sorting.ts"
import { adapters, moreAdapters } from "../../state.ts"
import { filter, first, matching, order, page, pages, rows, turnTo } from "./list.ts"
import { columnLabels } from "./table.tsx"

export function TableBar() {
  const input = useRef<HTMLInputElement>(null)
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target))
        return
      event.preventDefault()
      input.current?.select()
      input.current?.focus()
    }
    addEventListener("keydown", onKey)
    return () => removeEventListener("keydown", onKey)
  }, [])
  const setFilter = (text: string) => {
    filter.value = text
    turnTo(0)
  }
  return (
    <div class="bar">
      <label class="filter">
        <span class="hidden">Filter by name</span>
        <input
          ref={input}
          type="search"
          placeholder="Filter by name"
          value={filter.value}
          spellcheck={false}
          aria-keyshortcuts="/"
          onInput={(event) => setFilter(event.currentTarget.value)}
          onKeyDown={(event) => event.key === "Escape" && setFilter("")}
        />
        <kbd aria-hidden="true">/</kbd>
      </label>
      <SortSelect />
      <span class="faint" role="status">
        {filter.value.trim() !== "" && `${count(matching.value.length)} of ${count(adapters.value.length)}`}
        {moreAdapters.value && (
          <>
            {" "}
            The first {count(adapters.value.length)} by name are shown.{" "}
            {filter.value.trim() !== "" && (
              <a href={`#/adapters/${encodeURIComponent(filter.value.trim())}`}>Look for exactly this name</a>
            )}
          </>
        )}
      </span>
      <Pages />
    </div>
  )
}

function isTyping(target: EventTarget | null): boolean {
  return (
    target instanceof HTMLElement && target.matches("input, textarea, select, [contenteditable], dialog *")
  )
}

function SortSelect() {
  const choose = (column: Column) => {
    order.value = { column, down: startsDown(column) }
    turnTo(0)
  }
  return (
    <label class="sort-by">
      <span class="faint">Sort by</span>
      <select value={order.value.column} onChange={(event) => choose(event.currentTarget.value as Column)}>
        {columnLabels.map(([column, label]) => (
          <option key={column} value={column}>
            {label}
          </option>
        ))}
      </select>
    </label>
  )
}

export function Pages() {
  if (pages.value === 1) return null
  const last = first.value + rows.value.length
  return (
    <nav class="pages" aria-label="Pages of the table">
      <span>
        {count(first.value + 1)}–{count(last)} of {count(matching.value.length)}
      </span>
      <button type="button" disabled={page.value === 0} onClick={() => turnTo(page.value - 1)}>
        Previous
      </button>
      <button type="button" disabled={page.value >= pages.value - 1} onClick={() => turnTo(page.value + 1)}>
        Next
      </button>
    </nav>
  )
}

/** Deleting an adapter, once it was confirmed. */

import type { Adapter } from "../api.ts"
import { client, loadAdapters, notify } from "../state.ts"
import { question } from "./confirm.tsx"

type Named = Pick<Adapter, "name" | "active">

export function confirmDelete({ name, active }: Named, after?: () => void): void {
  const then = active ? " It is the active one: requests that name none will then run with the base." : ""
  question.value = {
    title: `Delete ${name}?`,
    text: `All its versions are deleted, for good. Requests that are running finish first.${then}`,
    yes: "Delete",
    danger: true,
    act: async () => {
      await client.value.remove(name)
      notify("done", `${name} was deleted.`)
      await loadAdapters()
      after?.()
    },
  }
}

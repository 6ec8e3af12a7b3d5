/** What the key that asks may not do, and why: the text of a disabled control's title. */

import { mayChange, mayInfer, whoAmI } from "./state.ts"

const UNKNOWN = "The server has not said yet what you may do."

export function whyNoRun(): string | null {
  if (whoAmI.value === null) return UNKNOWN
  return mayInfer.value ? null : "This key may not run requests."
}

/** null where it may. */
export function whyNoChange(): string | null {
  if (whoAmI.value === null) return UNKNOWN
  return mayChange.value ? null : "This key lacks the scope admin, which changing adapters needs."
}

/** Of one adapter's files: shared ones are not a tenant's to change. Activating is the tenant's own matter. */
export function whyNoEdit(adapter: { shared: boolean }): string | null {
  const tenant = whoAmI.value?.tenant ?? ""
  if (adapter.shared && tenant !== "") {
    return "A shared adapter: only keys of the shared tenant change it."
  }
  return whyNoChange()
}

/** Dark or light: the system's, until the user says otherwise. */

import { effect, signal } from "@preact/signals"
import { store, stored } from "./storage.ts"

export type Theme = "system" | "light" | "dark"
const KEY = "vblora.theme"

function chosen(): Theme {
  const value = stored("localStorage", KEY)
  return value === "light" || value === "dark" ? value : "system"
}

export const theme = signal<Theme>(chosen())

effect(() => {
  store("localStorage", KEY, theme.value === "system" ? null : theme.value)
  if (theme.value === "system") {
    delete document.documentElement.dataset["theme"]
  } else {
    document.documentElement.dataset["theme"] = theme.value
  }
})

export function nextTheme(): void {
  const order: Theme[] = ["system", "light", "dark"]
  theme.value = order[(order.indexOf(theme.value) + 1) % order.length] ?? "system"
}

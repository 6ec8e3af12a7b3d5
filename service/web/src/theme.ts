/** Dark or light: the system's, until the user says otherwise. */

import { effect, signal } from "@preact/signals"

export type Theme = "system" | "light" | "dark"
const KEY = "vblora.theme"

function stored(): Theme {
  const value = localStorage.getItem(KEY)
  return value === "light" || value === "dark" ? value : "system"
}

export const theme = signal<Theme>(stored())

effect(() => {
  if (theme.value === "system") {
    localStorage.removeItem(KEY)
    delete document.documentElement.dataset["theme"]
  } else {
    localStorage.setItem(KEY, theme.value)
    document.documentElement.dataset["theme"] = theme.value
  }
})

export function nextTheme(): void {
  const order: Theme[] = ["system", "light", "dark"]
  theme.value = order[(order.indexOf(theme.value) + 1) % order.length] ?? "system"
}

import { signal } from "@preact/signals"
import icon from "../icon.svg"
import { apiKey, place, version, whoAmI } from "../state.ts"
import { nextTheme, theme } from "../theme.ts"

export const keyDialogOpen = signal(false)

const VIEWS = [
  ["adapters", "Adapters"],
  ["playground", "Playground"],
  ["live", "Live"],
] as const

export function Header() {
  return (
    <header class="top">
      <a class="brand" href="#/adapters">
        <img src={icon} alt="" width="24" height="24" />
        <span>vblora-serve</span>
      </a>
      <nav aria-label="Views">
        {VIEWS.map(([view, label]) => (
          <a key={view} href={`#/${view}`} aria-current={place.value.view === view ? "page" : undefined}>
            {label}
          </a>
        ))}
        <a href="docs">API</a>
      </nav>
      <Base />
      <div class="tools">
        <button type="button" class="quiet" onClick={nextTheme} title="Dark or light">
          {{ system: "Auto", light: "Light", dark: "Dark" }[theme.value]}
        </button>
        {(whoAmI.value?.keys_required ?? true) && (
          <button type="button" class="quiet" onClick={() => (keyDialogOpen.value = true)}>
            {apiKey.value === null ? "Set key" : whoAmI.value?.tenant || "Key"}
          </button>
        )}
      </div>
    </header>
  )
}

function Base() {
  const base = version.value
  if (base === null) return <span class="base" />
  const parts = [base.model_type, base.quantization ?? base.dtype, base.device]
  return (
    <span class="base" title={`vblora-serve ${base.version}, torch ${base.torch}`}>
      <strong>{base.model}</strong> <span class="faint">{parts.join(" · ")}</span>
    </span>
  )
}

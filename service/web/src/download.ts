/** Files that the server gives only to a key: fetched, then handed to the browser as a download. */

import { brokenAnswer } from "./api.ts"
import { client } from "./state.ts"

export const FORMATS = [
  ["topk", "Compact (top-k)"],
  ["logits", "With full logits"],
  ["lora", "As plain LoRA"],
] as const
export type Format = (typeof FORMATS)[number][0]

/** A plain LoRA adapter has one form only. */
export const formatsOf = (adapter: { storage: string }) =>
  adapter.storage === "lora" ? FORMATS.filter(([format]) => format === "lora") : FORMATS

export async function exportAdapter(name: string, format: Format): Promise<void> {
  const response = await client.value.fetch(`v1/adapters/${encodeURIComponent(name)}/export?format=${format}`)
  const blob = await response.blob().catch(() => {
    throw brokenAnswer()
  })
  save(blob, `${name}-${format}.tar`)
}

function save(blob: Blob, filename: string): void {
  const url = URL.createObjectURL(blob)
  const link = document.createElement("a")
  link.href = url
  link.download = filename
  link.click()
  setTimeout(() => URL.revokeObjectURL(url), 60_000) // the browser may still be reading it
}

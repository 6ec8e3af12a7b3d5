/** Takes an answer, or its request, along. */

import { copy } from "../../clipboard.ts"
import { apiKey, client, notify, whoAmI } from "../../state.ts"
import { curl, lines, samplingOf, selectionOf } from "../../play/setup.ts"
import type { Column } from "../../play/setup.ts"
import { setup } from "../../play/state.ts"

interface Props {
  column: Column
  name: string
  text: string | undefined
}

export function Actions({ column, name, text }: Props) {
  return (
    <div class="row take">
      {text !== undefined && (
        <button
          type="button"
          class="quiet small"
          aria-label={`Copy the text of ${name}`}
          onClick={() => take(text, "The text is copied.")}
        >
          Copy text
        </button>
      )}
      <button
        type="button"
        class="quiet small"
        aria-label={`Copy ${name} as a curl command`}
        onClick={() => take(command(column), "The command is copied.")}
      >
        Copy as curl
      </button>
    </div>
  )
}

export async function take(text: string, done: string): Promise<void> {
  if (await copy(text)) notify("done", done)
  else notify("error", "The browser did not let the page copy.")
}

function command(column: Column): string {
  const { prompt, texts, options } = setup.value
  const keyed = apiKey.value !== null
  const task = whoAmI.value?.task
  if (task === "classify" || task === "embed") {
    const path = task === "classify" ? "v1/classify" : "v1/embeddings"
    const body = { input: lines(texts), ...selectionOf(column), mode: options.mode }
    return curl(client.value.url(path), body, keyed)
  }
  const body = { prompt, ...samplingOf(options), ...selectionOf(column), stream: true }
  return curl(client.value.url("v1/generate"), body, keyed)
}

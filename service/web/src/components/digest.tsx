/** A digest by its first digits, and a button that copies all of it. */

import { useState } from "preact/hooks"
import { copy } from "../clipboard.ts"
import { shortDigest } from "../format.ts"
import { notify } from "../state.ts"

const SHOWN_MS = 1500

export function Digest({ digest, whole = false }: { digest: string; whole?: boolean }) {
  const [copied, setCopied] = useState(false)
  const take = async () => {
    if (!(await copy(digest))) {
      notify("error", `The browser does not let this page copy. The digest is ${digest}`)
      return
    }
    setCopied(true)
    setTimeout(() => setCopied(false), SHOWN_MS)
  }
  return (
    <span class="digest">
      <code title={digest}>{whole ? digest : shortDigest(digest)}</code>
      <button
        type="button"
        class="quiet copy"
        aria-label="Copy the digest"
        title="Copy the digest"
        onClick={take}
      >
        <svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">
          {copied ? <path d="M3 8.5l3.2 3.2L13 4.8" /> : <path d="M5.5 5.5h7v8h-7zM10.5 5.5v-3h-7v8h2" />}
        </svg>
      </button>
      <span class="hidden" role="status">
        {copied ? "Copied" : ""}
      </span>
    </span>
  )
}

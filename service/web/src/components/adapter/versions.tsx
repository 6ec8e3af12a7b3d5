/** The versions that are kept of an adapter; an earlier one can be made current again. */

import type { AdapterDetail } from "../../api.ts"
import { bytes, shortDigest } from "../../format.ts"
import { whyNoEdit } from "../../rights.ts"
import { client, loadAdapters, notify } from "../../state.ts"
import { State } from "../badges.tsx"
import { question } from "../confirm.tsx"
import { Digest } from "../digest.tsx"
import { Time } from "./facts.tsx"

export function Versions({ adapter, changed }: { adapter: AdapterDetail; changed: () => Promise<void> }) {
  const why = whyNoEdit(adapter)
  return (
    <section class="card" aria-labelledby="versions-title">
      <h2 id="versions-title">Versions</h2>
      <div class="wide">
        <table class="plain versions">
          <thead>
            <tr>
              <th scope="col">Digest</th>
              <th scope="col">Created</th>
              <th scope="col">On disk</th>
              <th scope="col">State</th>
              <th scope="col">
                <span class="hidden">Roll back</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {adapter.versions.map((version) => (
              <tr key={version.digest}>
                <th scope="row">
                  <Digest digest={version.digest} />
                </th>
                <td>
                  <Time time={version.created_at} />
                </td>
                <td>{bytes(version.file_bytes)}</td>
                <td>
                  <State adapter={version} />
                </td>
                <td class="do">
                  {version.current ? (
                    <span class="badge">current</span>
                  ) : (
                    <button
                      type="button"
                      disabled={why !== null}
                      title={why ?? undefined}
                      aria-label={`Roll back to ${shortDigest(version.digest)}`}
                      onClick={() => askRollback(adapter.name, version.digest, changed)}
                    >
                      Roll back
                    </button>
                  )}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  )
}

function askRollback(name: string, digest: string, changed: () => Promise<void>): void {
  const short = shortDigest(digest)
  question.value = {
    title: `Roll ${name} back?`,
    text: `Requests from now on run with the version ${short}. The current one is kept, and can be made current again.`,
    yes: "Roll back",
    act: async () => {
      await client.value.rollback(name, digest)
      notify("done", `${name} is at ${short} again.`)
      await Promise.all([changed(), loadAdapters()])
    },
  }
}

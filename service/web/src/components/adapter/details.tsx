/** What one looks up now and then: the layers, the config, and what a blend was made of. */

import type { AdapterDetail } from "../../api.ts"
import { blockOf } from "../../heat.ts"
import { Digest } from "../digest.tsx"

export function TargetModules({ modules }: { modules: readonly string[] }) {
  const blocks = new Map<string, string[]>()
  for (const name of modules) {
    const { block, module } = blockOf(name)
    blocks.set(block, [...(blocks.get(block) ?? []), module])
  }
  return (
    <details class="card">
      <summary>
        <h2>Layers</h2> <span class="faint">{modules.length}</span>
      </summary>
      <dl class="blocks">
        {[...blocks].map(([block, inside]) => (
          <div key={block}>
            <dt>{block || "other"}</dt>
            <dd class="mono">{inside.join(", ")}</dd>
          </div>
        ))}
      </dl>
    </details>
  )
}

export function Config({ config }: { config: Record<string, unknown> }) {
  return (
    <details class="card">
      <summary>
        <h2>Config</h2> <span class="faint">as PEFT has it</span>
      </summary>
      <div class="wide">
        <table class="plain config">
          <tbody>
            {Object.entries(config).map(([key, value]) => (
              <tr key={key}>
                <th scope="row" class="mono">
                  {key}
                </th>
                <td class="mono">{JSON.stringify(value)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  )
}

export function Blend({ parts }: { parts: NonNullable<AdapterDetail["blend"]> }) {
  return (
    <section class="card" aria-labelledby="blend-title">
      <h2 id="blend-title">Blended from</h2>
      <table class="plain">
        <thead>
          <tr>
            <th scope="col">Adapter</th>
            <th scope="col">Weight</th>
            <th scope="col">Version</th>
          </tr>
        </thead>
        <tbody>
          {parts.map(({ name, weight, digest }) => (
            <tr key={name}>
              <th scope="row">
                <a href={`#/adapters/${encodeURIComponent(name)}`}>{name}</a>
              </th>
              <td>{weight}</td>
              <td>
                <Digest digest={digest} />
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      <p class="faint">It stays what it is when these change.</p>
    </section>
  )
}

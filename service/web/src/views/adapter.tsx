/** One adapter: all that is known of it, what it costs, how it uses its bank, and its versions. */

import { useCallback, useEffect, useState } from "preact/hooks"
import type { AdapterDetail } from "../api.ts"
import { Bank } from "../components/adapter/bank.tsx"
import { Commands } from "../components/adapter/commands.tsx"
import { Blend, Config, TargetModules } from "../components/adapter/details.tsx"
import { Facts } from "../components/adapter/facts.tsx"
import { ParameterCounts } from "../components/adapter/parameters.tsx"
import { Versions } from "../components/adapter/versions.tsx"
import { Badges } from "../components/badges.tsx"
import { ConfirmDialog } from "../components/confirm.tsx"
import { usePolling } from "../polling.ts"
import { client, whoAmI } from "../state.ts"
import "./adapters.css"
import "./adapter.css"

const REFRESH_MS = 5000

export function AdapterPage({ name }: { name: string }) {
  const [adapter, setAdapter] = useState<AdapterDetail | null>(null)
  const [refused, setRefused] = useState<string | null>(null)
  const asked = client.value
  const load = useCallback(async () => {
    try {
      setAdapter(await asked.adapter(name))
      setRefused(null)
    } catch (error) {
      setRefused(error instanceof Error ? error.message : String(error))
    }
  }, [name, asked])
  useEffect(() => {
    void load()
  }, [load])
  usePolling(load, REFRESH_MS)

  return (
    <div class="adapter-view">
      <nav aria-label="Where this is">
        <a href="#/adapters">← Adapters</a>
      </nav>
      <div class="heading">
        <h1>{name}</h1>
        {adapter && (
          <span class="badges">
            <Badges adapter={adapter} tenant={whoAmI.value?.tenant ?? ""} />
          </span>
        )}
        {adapter && <Commands adapter={adapter} changed={load} />}
      </div>
      {refused !== null && (
        <p class="refusal" role="alert">
          {refused}
        </p>
      )}
      {adapter === null && refused === null && <p class="card empty faint">Loading…</p>}
      {adapter && <Parts adapter={adapter} changed={load} />}
      <ConfirmDialog />
    </div>
  )
}

function Parts({ adapter, changed }: { adapter: AdapterDetail; changed: () => Promise<void> }) {
  const { name, digest } = adapter
  return (
    <>
      {adapter.warnings.length > 0 && (
        <ul class="card warnings" aria-label="Warnings">
          {adapter.warnings.map((warning) => (
            <li key={warning}>{warning}</li>
          ))}
        </ul>
      )}
      <div class="columns">
        <Facts adapter={adapter} />
        <div class="stack">
          <ParameterCounts name={name} digest={digest} />
          {adapter.blend && <Blend parts={adapter.blend} />}
          <Versions adapter={adapter} changed={changed} />
        </div>
      </div>
      {adapter.num_vectors !== null && <Bank name={name} digest={digest} />}
      <TargetModules modules={adapter.target_modules} />
      <Config config={adapter.config} />
    </>
  )
}

/** The adapters that wait to be uploaded: what was chosen, what each is called, and how far each is. */

import { batch, signal } from "@preact/signals"
import { ApiError } from "../api.ts"
import type { Adapter } from "../api.ts"
import { adapters, client, keyRefused, loadAdapters, notify } from "../state.ts"
import { batches, missing, nameFault, nameFrom } from "./files.ts"
import type { Batch, Files, Found } from "./files.ts"
import { send } from "./send.ts"
import type { Options } from "./form.ts"

export type Progress =
  | { at: "chosen" }
  | { at: "waiting" }
  | { at: "sending"; sent: number; total: number }
  | { at: "checking" }
  | { at: "refused"; code: string; message: string }
  | { at: "stored"; adapter: Adapter }

export interface Job extends Options {
  id: number
  files: Files
  others: string[]
  loose: boolean // its files came without a directory: more may come one by one
  progress: Progress
}

export const jobs = signal<Job[]>([])
export const panelOpen = signal(false)

let lastId = 0
let running: { id: number; abort: AbortController } | null = null

export const isEditable = ({ progress }: Job): boolean =>
  progress.at === "chosen" || progress.at === "refused"

export const isReady = (job: Job): boolean =>
  isEditable(job) && nameFault(job.name) === null && missing(job.files).length === 0

export function add(found: readonly Found[]): void {
  batch(() => {
    for (const chosen of batches(found)) {
      const open = chosen.directory === null ? jobs.value.find((job) => job.loose && isEditable(job)) : null
      if (open) change(open.id, { files: { ...open.files, ...chosen.files }, others: chosen.others })
      else jobs.value = [...jobs.value, jobOf(chosen)]
    }
    panelOpen.value = true
  })
}

function jobOf({ directory, files, others }: Batch): Job {
  const name = nameFrom(directory)
  const progress: Progress = { at: "chosen" }
  const options = { name, replace: false, mismatch: false, activate: "" } as const
  return { id: ++lastId, ...options, files, others, loose: directory === null, progress }
}

export function change(id: number, changes: Partial<Job>): void {
  jobs.value = jobs.value.map((job) => (job.id === id ? { ...job, ...changes } : job))
}

export function remove(id: number): void {
  cancel(id)
  jobs.value = jobs.value.filter((job) => job.id !== id)
}

/** What was chosen stays, so that it can be sent again. */
export function cancel(id: number): void {
  if (running?.id === id) running.abort.abort()
  else change(id, { progress: { at: "chosen" } })
}

/** Puts jobs in line; one is sent at a time, for the server checks as few at once. */
export function start(ids: readonly number[]): void {
  batch(() => ids.forEach((id) => change(id, { progress: { at: "waiting" } })))
  if (running === null) void work()
}

async function work(): Promise<void> {
  let job: Job | undefined
  while ((job = jobs.value.find(({ progress }) => progress.at === "waiting"))) {
    const abort = new AbortController()
    running = { id: job.id, abort }
    await one(job, abort.signal)
    running = null
  }
}

async function one(job: Job, signal: AbortSignal): Promise<void> {
  const { id } = job
  const onProgress = (sent: number, total: number) =>
    change(id, { progress: sent < total ? { at: "sending", sent, total } : { at: "checking" } })
  onProgress(0, 1)
  try {
    const adapter = await send(client.value, job, job.files, onProgress, signal)
    change(id, { progress: { at: "stored", adapter } })
    notify("done", `${adapter.name} was uploaded.`)
    await loadAdapters().catch(() => undefined) // the table says so itself
  } catch (error) {
    change(id, { progress: refusal(error) })
  }
}

function refusal(error: unknown): Progress {
  if (error instanceof DOMException && error.name === "AbortError") return { at: "chosen" }
  if (!(error instanceof ApiError)) return { at: "refused", code: "unknown", message: String(error) }
  if (error.status === 401) keyRefused.value = error.message
  return { at: "refused", code: error.code, message: error.message }
}

export const exists = (name: string): boolean => adapters.value.some((adapter) => adapter.name === name)

/** Runs the playground's columns, all at once, and stops them. */

import { signal } from "@preact/signals"
import { ApiError } from "../api.ts"
import type { Client } from "../api.ts"
import { client, keyRefused, whoAmI } from "../state.ts"
import { generate } from "../stream.ts"
import { blank, take } from "./answer.ts"
import type { Answer } from "./answer.ts"
import { classify, embed } from "./pooled.ts"
import type { Pooled } from "./pooled.ts"
import { lackOf, lines, samplingOf, selectionOf, titleOf } from "./setup.ts"
import type { Column, Options, Setup } from "./setup.ts"
import { setup } from "./state.ts"

export const answers = signal<ReadonlyMap<number, Answer>>(new Map())
export const pooled = signal<ReadonlyMap<number, Pooled>>(new Map())
export const running = signal(false)

let controller: AbortController | null = null

export function stop(): void {
  controller?.abort()
}

/** Answers of other columns, which had the same numbers. */
export function forget(): void {
  stop()
  answers.value = new Map()
  pooled.value = new Map()
}

export async function run(): Promise<void> {
  if (running.value) return
  const own = (controller = new AbortController())
  running.value = true
  const asked = setup.value
  try {
    const task = whoAmI.value?.task
    if (task === "classify" || task === "embed") await runPooled(asked, task, own.signal)
    else await runGenerations(asked, own.signal)
  } finally {
    running.value = false
  }
}

/** Without a seed columns would draw each their own, and differ by luck: the page draws one for all. */
export function seeded(options: Options): Options {
  if (options.seed !== null || options.temperature === 0) return options
  return { ...options, seed: Math.floor(Math.random() * 2 ** 31) }
}

async function runGenerations(asked: Setup, signal: AbortSignal): Promise<void> {
  const options = seeded(asked.options)
  const drafts = new Map(
    asked.columns.map((column) => [column.id, blank(titleOf(column), performance.now(), options.seed)]),
  )
  const publish = frameByFrame(() => {
    answers.value = new Map([...drafts].map(([id, draft]) => [id, { ...draft }]))
  })
  publish.now()
  await Promise.all(
    asked.columns.map(async (column) => {
      const draft = drafts.get(column.id)
      if (draft) await stream(client.value, asked.prompt, column, options, draft, signal, publish.soon)
      publish.soon()
    }),
  )
  publish.now()
}

async function stream(
  client: Client,
  prompt: string,
  column: Column,
  options: Options,
  draft: Answer,
  signal: AbortSignal,
  changed: () => void,
): Promise<void> {
  try {
    const lack = lackOf(column)
    if (lack !== null) throw new ApiError(0, "incomplete", lack, null, null)
    const request = { prompt, ...samplingOf(options) }
    for await (const delta of generate(client, request, selectionOf(column), signal)) {
      take(draft, delta, performance.now())
      changed()
    }
  } catch (error) {
    if (signal.aborted) {
      if (draft.status !== "done") draft.status = "stopped"
      return
    }
    draft.status = "failed"
    draft.error = said(error)
  }
}

async function runPooled(asked: Setup, task: "classify" | "embed", signal: AbortSignal): Promise<void> {
  const ask = task === "classify" ? classify : embed
  const put = (id: number, found: Pooled) => (pooled.value = new Map([...pooled.value, [id, found]]))
  pooled.value = new Map(asked.columns.map(({ id }) => [id, { status: "waiting" } as const]))
  await Promise.all(
    asked.columns.map(async (column) => {
      try {
        const lack = lackOf(column)
        if (lack !== null) throw new ApiError(0, "incomplete", lack, null, null)
        const body = { ...selectionOf(column), mode: asked.options.mode }
        put(column.id, await ask(client.value, lines(asked.texts), body, signal))
      } catch (error) {
        put(column.id, signal.aborted ? { status: "stopped" } : { status: "failed", ...said(error) })
      }
    }),
  )
}

/** The server's words; a key that is refused is asked for anew. */
export function said(error: unknown): { message: string; code: string } {
  if (!(error instanceof ApiError)) return { message: String(error), code: "" }
  if (error.status === 401) keyRefused.value = error.message
  return { message: error.message, code: error.code }
}

/** Tokens may come faster than a screen shows them: at most one publication a frame. */
function frameByFrame(publish: () => void): { soon: () => void; now: () => void } {
  let frame: number | null = null
  const now = () => {
    if (frame !== null) cancelAnimationFrame(frame)
    frame = null
    publish()
  }
  return { now, soon: () => void (frame ??= requestAnimationFrame(now)) }
}

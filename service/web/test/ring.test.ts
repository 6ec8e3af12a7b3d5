import assert from "node:assert/strict"
import { test } from "node:test"
import type { Stats } from "../src/api.ts"
import { FOREIGN, OTHERS, WINDOW_S, keep, rates, shares } from "../src/live/ring.ts"
import { Slots } from "../src/live/slots.ts"

function moment(time: number, more: Partial<Stats> = {}): Stats {
  return {
    time,
    uptime_s: time,
    state: "ready",
    queue_depth: 0,
    running: 0,
    distinct_adapters: 0,
    batch: [],
    prompt_tokens: 0,
    completion_tokens: 0,
    cached_tokens: 0,
    latency: null,
    memory: null,
    limits: { max_batch_size: 16, max_queue: 256, max_context: 512 },
    ...more,
  }
}

const timesOf = (moments: Stats[]) => moments.map(({ time }) => time)

test("five minutes are kept, and no more", () => {
  let kept: Stats[] = []
  for (let time = 1; time <= 2 * WINDOW_S; time++) kept = keep(kept, moment(time))
  assert.equal(kept.length, WINDOW_S)
  assert.deepEqual(timesOf(kept).slice(0, 1), [WINDOW_S + 1])
  assert.equal(kept.at(-1)?.time, 2 * WINDOW_S)
})

test("a moment that is no later is left out, and a clock that was set back begins anew", () => {
  const kept = [moment(10), moment(11)]
  assert.deepEqual(timesOf(keep(kept, moment(11))), [10, 11])
  assert.deepEqual(timesOf(keep(kept, moment(10.5))), [10, 11])
  assert.deepEqual(timesOf(keep(kept, moment(5))), [5])
})

test("rates are differences by time; unknown at first, behind gaps, and behind a restart", () => {
  const totals: [number, number | null][] = [
    [1, 100],
    [2, 150],
    [4, 250],
    [60, 900], // a gap
    [61, 910],
    [62, 5], // the server began anew
    [63, null],
    [64, 7],
    [65, 9],
  ]
  const moments = totals.map(([time, completion_tokens]) => moment(time, { completion_tokens }))
  const found = rates(moments, (stats) => stats.completion_tokens)
  assert.deepEqual(found, [null, 50, 50, null, 10, null, null, null, 2])
})

test("the largest selections of the window are named, the rest and other tenants' are summed", () => {
  const moments = [
    moment(1, { batch: [part("a", 3), part("b", 2), part("c", 1), part(null, 4)] }),
    moment(2, { batch: [part("d", 2), part("b", 5)] }),
  ]
  assert.deepEqual(
    [...shares(moments, 2)],
    [
      ["b", [2, 5]],
      ["a", [3, 0]],
      [OTHERS, [1, 2]],
      [FOREIGN, [4, 0]],
    ],
  )
})

function part(selection: string | null, rows: number): Stats["batch"][number] {
  return { selection, rows }
}

test("a selection keeps its colour while others come and go", () => {
  const slots = new Slots(3)
  assert.deepEqual(
    [...slots.assign(["a", "b"])],
    [
      ["a", 1],
      ["b", 2],
    ],
  )
  const later = slots.assign(["c", "d", "b"])
  assert.equal(later.get("b"), 2)
  assert.deepEqual([...later.values()].sort(), [1, 2, 3])
  assert.equal(later.has("a"), false)
})

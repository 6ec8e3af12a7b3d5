import assert from "node:assert/strict"
import { test } from "node:test"
import type { Adapter } from "../src/api.ts"
import { filtered, nextOrder, sorted } from "../src/sorting.ts"

const adapter = (name: string, more: Partial<Adapter> = {}): Adapter => ({
  name,
  digest: `sha256:${name}`,
  base: "base",
  created_at: 0,
  updated_at: 0,
  state: "READY",
  reason: null,
  shared: true,
  active: false,
  mode: null,
  file_bytes: 10,
  resident_bytes: 0,
  pins: 0,
  last_used: null,
  requests: 0,
  r: 4,
  num_vectors: 8,
  vector_length: 4,
  topk: 2,
  storage: "topk",
  vblora_params: 100,
  total_params: 100,
  lora_params: 400,
  resumable: false,
  warnings: [],
  target_modules: 2,
  ...more,
})
const names = (adapters: readonly Adapter[]) => adapters.map(({ name }) => name).join(" ")

test("numbers are sorted as numbers, both ways", () => {
  const all = [adapter("a", { requests: 9 }), adapter("b", { requests: 10 }), adapter("c", { requests: 1 })]
  assert.equal(names(sorted(all, { column: "requests", down: true })), "b a c")
  assert.equal(names(sorted(all, { column: "requests", down: false })), "c a b")
})

test("what has no value comes last either way", () => {
  const all = [adapter("never"), adapter("late", { last_used: 9 }), adapter("early", { last_used: 1 })]
  assert.equal(names(sorted(all, { column: "used", down: true })), "late early never")
  assert.equal(names(sorted(all, { column: "used", down: false })), "early late never")
  const lora = adapter("lora", { vblora_params: null, num_vectors: null, total_params: 400 })
  assert.equal(names(sorted([lora, ...all], { column: "compression", down: false })), "early late never lora")
  assert.equal(names(sorted([lora, adapter("z")], { column: "bank", down: true })), "z lora")
})

test("equal ones are in the order of their names", () => {
  const all = [adapter("b"), adapter("a"), adapter("c")]
  assert.equal(names(sorted(all, { column: "rank", down: true })), "a b c")
  assert.equal(names(sorted(all, { column: "name", down: true })), "c b a")
})

test("what failed comes first of the states", () => {
  const all = [adapter("a", { state: "STORED" }), adapter("b", { state: "FAILED" })]
  assert.equal(names(sorted(all, { column: "state", down: false })), "b a")
})

test("a column's first click sorts numbers from the largest, its second turns them round", () => {
  const first = nextOrder({ column: "name", down: false }, "params")
  assert.deepEqual(first, { column: "params", down: true })
  assert.deepEqual(nextOrder(first, "params"), { column: "params", down: false })
  assert.deepEqual(nextOrder(first, "name"), { column: "name", down: false })
})

test("a filter wants every word, in any case, or the start of a digest", () => {
  const all = [adapter("Support-de", { digest: "sha256:abcd1234" }), adapter("support-en"), adapter("sql")]
  assert.equal(names(filtered(all, "")), "Support-de support-en sql")
  assert.equal(names(filtered(all, "support")), "Support-de support-en")
  assert.equal(names(filtered(all, "DE supp")), "Support-de")
  assert.equal(names(filtered(all, "abcd12")), "Support-de")
  assert.equal(names(filtered(all, "sha256:abcd")), "Support-de")
  assert.equal(names(filtered(all, "none")), "")
})

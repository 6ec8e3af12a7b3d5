import assert from "node:assert/strict"
import { test } from "node:test"
import type { BankUsage } from "../src/api.ts"
import {
  blockOf,
  columnsFor,
  heatOf,
  largest,
  percent,
  rowAt,
  rowSize,
  rowTops,
  vectorsOf,
} from "../src/heat.ts"

const layer = (name: string) => ({ name, A: [0.75, 0, 0.25], B: [0.5, 0.5, 0] })
const usage = (...names: string[]): BankUsage => ({
  adapter: "a",
  digest: "sha256:0",
  num_vectors: 8,
  vector_length: 4,
  topk: 2,
  columns: 3,
  vectors_per_column: 3,
  used_vectors: 7,
  unused_vectors: 1,
  layers: names.map(layer),
})

test("layers are grouped by the block that they are of", () => {
  assert.deepEqual(blockOf("model.layers.12.self_attn.q_proj"), {
    block: "layers.12",
    module: "self_attn.q_proj",
  })
  assert.deepEqual(blockOf("encoder.block.0.layer.0.SelfAttention.q"), {
    block: "encoder.block.0",
    module: "layer.0.SelfAttention.q",
  })
  assert.deepEqual(blockOf("lm_head"), { block: "", module: "lm_head" })
  const { rows, groups } = heatOf(usage("model.layers.0.q", "model.layers.0.v", "model.layers.1.q"))
  assert.deepEqual(
    rows.map(({ side }) => side),
    ["A", "B", "A", "B", "A", "B"],
  )
  assert.deepEqual(groups, [
    { label: "layers.0", from: 0, to: 4 },
    { label: "layers.1", from: 4, to: 6 },
  ])
})

test("a column's total is the mean of its shares, so that totals sum to 1", () => {
  const { totals, most } = heatOf(usage("a", "b"))
  assert.deepEqual(totals, [0.625, 0.25, 0.125])
  assert.equal(most, 0.75)
})

test("a column names the vectors that it stands for, the last one those that are left", () => {
  assert.equal(vectorsOf(0, usage()), "vectors 0 to 2")
  assert.equal(vectorsOf(2, usage()), "vectors 6 to 7")
  assert.equal(vectorsOf(5, { num_vectors: 8, vectors_per_column: 1 }), "vector 5")
})

test("the largest shares, without those that are none", () => {
  assert.deepEqual(largest([0.2, 0, 0.5, 0.3], 2), [
    { column: 2, share: 0.5 },
    { column: 3, share: 0.3 },
  ])
  assert.equal(largest([0, 1, 0], 8).length, 1)
})

test("which row is at a height, gaps between groups included", () => {
  const heat = heatOf(usage("model.layers.0.q", "model.layers.1.q"))
  const tops = rowTops(heat, 10, 4)
  assert.deepEqual(tops, [0, 10, 24, 34])
  assert.equal(rowAt(tops, 10, -1), null)
  assert.equal(rowAt(tops, 10, 9.5), 0)
  assert.equal(rowAt(tops, 10, 22), 2)
  assert.equal(rowAt(tops, 10, 43), 3)
  assert.equal(rowAt(tops, 10, 44), null)
})

test("columns and rows by the room there is", () => {
  assert.equal(columnsFor(1150), 256)
  assert.equal(columnsFor(300), 64)
  assert.equal(columnsFor(10), 16)
  assert.equal(columnsFor(9999), 1024)
  assert.equal(rowSize(56), 12)
  assert.equal(rowSize(448), 4)
})

test("shares", () => {
  assert.equal(percent(0), "0 %")
  assert.equal(percent(0.0004), "< 0.1 %")
  assert.equal(percent(0.125), "12.5 %")
})

import assert from "node:assert/strict"
import { test } from "node:test"
import { cosines } from "../src/play/cosine.ts"
import { found } from "../src/play/find.ts"
import {
  DEFAULT,
  curl,
  jsonOf,
  lackOf,
  lines,
  samplingOf,
  selectionOf,
  setupFrom,
} from "../src/play/setup.ts"
import type { Column, Setup } from "../src/play/setup.ts"

const blend: Column = {
  id: 7,
  kind: "blend",
  name: "shout",
  blend: [
    { name: "shout", weight: 0.7 },
    { name: "dashes", weight: -0.3 },
  ],
}
const one: Column = { ...blend, id: 3, kind: "one" }

test("what is written is read back, with columns counted anew", () => {
  const setup: Setup = { ...DEFAULT, prompt: "x/%'\n", columns: [blend, one], reference: 3 }
  const columns = [
    { ...blend, id: 1 },
    { ...one, id: 2 },
  ]
  assert.deepEqual(setupFrom(jsonOf(setup)), { ...setup, columns, reference: 2 })
})

test("what anybody put in a link cannot break the page", () => {
  for (const json of [
    "",
    "{",
    "null",
    "[]",
    "3",
    '{"columns": []}',
    '{"columns": [3, null]}',
    '{"options": []}',
  ]) {
    assert.deepEqual(setupFrom(json), DEFAULT, json)
  }
  const odd =
    '{"prompt": 5, "columns": [{"kind": "?", "blend": [{"weight": "1"}]}], "options": {"seed": {}, "top_k": 3}}'
  const read = setupFrom(odd)
  assert.equal(read.prompt, DEFAULT.prompt)
  assert.deepEqual(read.columns, [{ id: 1, kind: "one", name: "", blend: [{ name: "", weight: 1 }] }])
  assert.deepEqual(read.options, { ...DEFAULT.options, top_k: 3 })
  assert.equal(read.reference, 1)
  assert.equal(setupFrom(JSON.stringify({ columns: Array(9).fill(one) })).columns.length, 6)
})

test("a column says what a request runs with, and what it lacks", () => {
  assert.deepEqual(selectionOf(one), { adapter: "shout" })
  assert.deepEqual(selectionOf(blend), { adapters: blend.blend })
  assert.equal(lackOf(blend), null)
  assert.notEqual(lackOf({ ...one, name: "" }), null)
  assert.notEqual(lackOf({ ...blend, blend: [] }), null)
  assert.notEqual(lackOf({ ...blend, blend: [{ name: "", weight: 1 }] }), null)
})

test("options that were left empty are not sent", () => {
  assert.deepEqual(samplingOf(DEFAULT.options), { max_new_tokens: 64, temperature: 0, mode: "switch" })
})

test("a command is quoted for the shell, and has no key in it", () => {
  const command = curl("http://x/v1/generate", { prompt: "it's $HOME" }, true)
  assert.ok(command.includes(`-d '{"prompt":"it'\\''s $HOME"}'`), command)
  assert.ok(command.includes('"Authorization: Bearer $VBLORA_API_KEY"'))
  assert.ok(!curl("http://x", {}, false).includes("Authorization"))
})

test("texts are the lines that are not empty", () => {
  assert.deepEqual(lines("one\n\n  two \r\n"), ["one", "two"])
})

test("names that begin with what was typed come first, and few are shown of many", () => {
  const names = ["base", "my-sql", "sql", "SQL-two"]
  assert.deepEqual(found(names, "sql", false), { shown: ["sql", "SQL-two", "my-sql"], left: 0 })
  const many = Array.from({ length: 2000 }, (_, i) => `adapter-${i}`)
  assert.equal(found(many, "", false).shown.length, 50)
  assert.equal(found(many, "", false).left, 1950)
})

test("a name that the page does not hold can be typed", () => {
  assert.deepEqual(found(["sql"], "sql@sha256:12345678", false).shown, ["sql@sha256:12345678"])
  assert.deepEqual(found(["sql"], "new", false).shown, ["new"])
  assert.deepEqual(found(["sql-1"], "sql", true).shown, ["sql-1", "sql"])
  assert.deepEqual(found(["sql"], "sql", true).shown, ["sql"])
})

test("cosines of vectors", () => {
  const [first, second] = cosines([
    [1, 0],
    [3, 4],
  ])
  assert.deepEqual(first, [1, 0.6])
  assert.deepEqual(second, [0.6, 1])
  assert.deepEqual(cosines([[0, 0]]), [[0]])
})

import assert from "node:assert/strict"
import { test } from "node:test"
import { charactersBefore, divergence, wordsOf } from "../src/play/diverge.ts"

const answer = (tokens: number[], ended = false) => ({ tokens, ended })
const words = (own: ReturnType<typeof answer>, reference: ReturnType<typeof answer>) =>
  wordsOf(divergence(own, reference))

test("the first token that differs, counted from 1", () => {
  assert.equal(words(answer([1, 2, 9, 4]), answer([1, 2, 3, 4])), "differs from token 3")
  assert.equal(words(answer([9]), answer([1, 2, 3])), "differs from token 1")
})

test("while one is behind, they are the same so far", () => {
  assert.equal(words(answer([1, 2]), answer([1, 2, 3])), "same so far")
  assert.equal(words(answer([1, 2, 3]), answer([1, 2])), "same so far")
  assert.equal(words(answer([]), answer([1])), "")
  assert.equal(words(answer([1, 2]), answer([1, 2], true)), "same so far")
  assert.equal(words(answer([1, 2], true), answer([1, 2], true)), "same tokens")
})

test("an end is a difference where the other goes on", () => {
  assert.equal(words(answer([1, 2], true), answer([1, 2, 3])), "ends before token 3")
  assert.equal(words(answer([1, 2, 3]), answer([1, 2], true)), "differs from token 3")
})

test("text is cut at a token; what was held back belongs to the token that it came with", () => {
  const pieces = [
    { text: "ab", tokens: 1 },
    { text: "", tokens: 1 },
    { text: "cde", tokens: 1 },
    { text: "fg", tokens: 2 },
  ]
  const cuts = [0, 1, 2, 3, 4, 5].map((token) => charactersBefore(pieces, token))
  assert.deepEqual(cuts, [0, 2, 2, 5, 5, 7])
})

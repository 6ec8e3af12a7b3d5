import assert from "node:assert/strict"
import { test } from "node:test"
import { ago, bytes, compression, seconds, shortDigest } from "../src/format.ts"

test("sizes have the unit that leaves few digits", () => {
  assert.equal(bytes(0), "0 B")
  assert.equal(bytes(999), "999 B")
  assert.equal(bytes(61364), "61.4 kB")
  assert.equal(bytes(999_600), "1.0 MB")
  assert.equal(bytes(123_456_789), "123 MB")
})

test("times are in milliseconds while they are short", () => {
  assert.equal(seconds(0.0042), "4.2 ms")
  assert.equal(seconds(0.042), "42 ms")
  assert.equal(seconds(1.234), "1.23 s")
  assert.equal(seconds(12.34), "12.3 s")
})

test("how long ago", () => {
  assert.equal(ago(100, 101), "now")
  assert.equal(ago(100, 175), "1 min ago")
  assert.equal(ago(0, 90_000), "1 d ago")
})

test("compression is against plain LoRA, which has none itself", () => {
  assert.equal(compression(71680, 11272), "6.4×")
  assert.equal(compression(71680, null), null)
})

test("a digest is shown by its first twelve digits", () => {
  assert.equal(shortDigest("sha256:5370f0f9e8b09ae638d7"), "5370f0f9e8b0")
})

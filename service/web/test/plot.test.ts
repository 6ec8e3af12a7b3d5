import assert from "node:assert/strict"
import { test } from "node:test"
import { area, line, nearest, stacked, stretches, ticks } from "../src/live/plot.ts"

test("ticks are round, begin at 0 and hold the highest value", () => {
  assert.deepEqual(ticks(7), [0, 2, 4, 6, 8])
  assert.deepEqual(ticks(100), [0, 25, 50, 75, 100])
  assert.deepEqual(ticks(0.037), [0, 0.01, 0.02, 0.03, 0.04])
  for (let most = 0.001; most < 1e9; most *= 1.37) {
    const marks = ticks(most)
    const last = marks.at(-1) ?? 0
    assert.ok(last >= most * 0.999 && marks.length >= 2 && marks.length <= 6, `${most}: ${marks}`)
    assert.ok((marks.at(-2) ?? 0) < most, `${most}: ${marks}`)
  }
})

test("ticks of counts are whole, also of nothing", () => {
  assert.deepEqual(ticks(0), [0, 1])
  assert.deepEqual(ticks(0, true), [0, 1])
  assert.deepEqual(ticks(1, true), [0, 1])
  assert.deepEqual(ticks(3, true), [0, 1, 2, 3])
  assert.deepEqual(ticks(9, true), [0, 5, 10])
})

const drawn = (times: number[]) => ({ times, x: (time: number) => time, y: (value: number) => value })

test("a line breaks where nothing is known and where nobody asked", () => {
  assert.deepEqual(
    stretches([1, 2, 3, 60, 61], (i) => i !== 1),
    [
      [0, 0],
      [2, 2],
      [3, 4],
    ],
  )
  assert.equal(line([5, 6, null, 7, 8], drawn([1, 2, 3, 4, 5])), "M1.0,5.0L2.0,6.0M4.0,7.0L5.0,8.0")
  assert.equal(line([5, 6, 7], drawn([1, 2, 60])), "M1.0,5.0L2.0,6.0M60.0,7.0h1.5")
})

test("areas stand on each other, and close", () => {
  const [first, second] = stacked([
    [1, 2],
    [10, 20],
  ])
  assert.deepEqual(first, { lower: [0, 0], upper: [1, 2] })
  assert.deepEqual(second, { lower: [1, 2], upper: [11, 22] })
  assert.equal(area([0, 0], [1, 2], drawn([1, 2])), "M1.0,1.0L2.0,2.0L2.0,0.0L1.0,0.0Z")
})

test("the nearest moment", () => {
  assert.equal(nearest([1, 2, 5], 3.2), 1)
  assert.equal(nearest([1, 2, 5], 99), 2)
  assert.equal(nearest([], 1), -1)
})

import assert from "node:assert/strict"
import { test } from "node:test"
import { batches, missing, nameFault, nameFrom } from "../src/upload/files.ts"
import { formOf, uploadPath } from "../src/upload/form.ts"

const found = (...paths: string[]) =>
  paths.map((path) => ({ path, file: new File(["x"], path.split("/").at(-1) ?? "") }))
const PAIR = ["adapter_config.json", "adapter_model.safetensors"]

test("each directory with an adapter's files is one upload", () => {
  const all = batches(
    found(
      ...PAIR.map((file) => `run/sql/${file}`),
      ...PAIR.map((file) => `run/chat/${file}`),
      "run/readme.md",
    ),
  )
  assert.deepEqual(
    all.map(({ directory }) => directory),
    ["sql", "chat"],
  )
  assert.ok(all.every(({ files }) => missing(files).length === 0))
})

test("what an upload does not take is left out, and named", () => {
  const [only] = batches(found("sql/adapter_config.json", "sql/chat_template.jinja", "sql/optimizer.pt"))
  assert.deepEqual(Object.keys(only?.files ?? {}).sort(), ["chat_template", "config"])
  assert.deepEqual(only?.others, ["optimizer.pt"])
  assert.deepEqual(missing(only?.files ?? {}), ["adapter_model.safetensors"])
})

test("files without a directory belong together", () => {
  const [only] = batches(found(...PAIR))
  assert.equal(only?.directory, null)
  assert.deepEqual(missing(only?.files ?? {}), [])
  assert.equal(batches([]).length, 0)
})

test("other files alone still say what is missing", () => {
  const [only, ...rest] = batches(found("dir/adapter_model.bin"))
  assert.equal(rest.length, 0)
  assert.deepEqual(missing(only?.files ?? {}), PAIR)
  assert.deepEqual(only?.others, ["dir/adapter_model.bin"])
})

test("names by the server's rules", () => {
  for (const name of ["a", "A1._-", "x".repeat(128)]) assert.equal(nameFault(name), null, name)
  for (const name of ["", "-a", ".a", "a b", "a/b", "ä", "x".repeat(129)])
    assert.notEqual(nameFault(name), null, name)
})

test("a directory's name becomes one that the server takes", () => {
  assert.equal(nameFrom("sql-v2"), "sql-v2")
  assert.equal(nameFrom("my adapter (final)"), "my-adapter-final-")
  assert.equal(nameFrom("..hidden"), "hidden")
  assert.equal(nameFrom("Übung"), "Ubung")
  assert.equal(nameFrom(null), "")
  assert.equal(nameFault(nameFrom("_" + "x".repeat(200))), null)
})

test("the form has the name first and the weights last, under the server's names for the parts", () => {
  const [only] = batches(found("sql/adapter_model.safetensors", "sql/labels.json", "sql/adapter_config.json"))
  const options = { name: "sql", replace: false, mismatch: false, activate: "merge" } as const
  const form = formOf(options, only?.files ?? {})
  assert.deepEqual([...form.keys()], ["name", "activate", "config", "labels", "weights"])
  assert.equal(uploadPath(options), "v1/adapters")
  assert.equal(
    uploadPath({ ...options, replace: true, mismatch: true }),
    "v1/adapters?replace=true&allow_base_mismatch=true",
  )
})

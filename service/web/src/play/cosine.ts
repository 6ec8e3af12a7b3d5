/** The cosine of the angle between each two vectors: rows and columns in their order. */
export function cosines(vectors: readonly (readonly number[])[]): number[][] {
  const lengths = vectors.map((vector) => Math.sqrt(dot(vector, vector)))
  return vectors.map((one, i) =>
    vectors.map((other, j) => {
      const product = (lengths[i] ?? 0) * (lengths[j] ?? 0)
      return product === 0 ? 0 : dot(one, other) / product
    }),
  )
}

function dot(one: readonly number[], other: readonly number[]): number {
  return one.reduce((sum, value, i) => sum + value * (other[i] ?? 0), 0)
}

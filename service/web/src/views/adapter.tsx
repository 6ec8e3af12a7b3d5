export function AdapterPage({ name }: { name: string }) {
  return <h1>{name}</h1>
}

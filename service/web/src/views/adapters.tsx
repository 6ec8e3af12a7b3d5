export function Adapters() {
  return <h1>Adapters</h1>
}

import { Header } from "./components/header.tsx"
import { KeyDialog } from "./components/key.tsx"
import { Notices } from "./components/notices.tsx"
import { usePolling } from "./polling.ts"
import { place, reconnect } from "./state.ts"
import { Adapters } from "./views/adapters.tsx"
import { AdapterPage } from "./views/adapter.tsx"
import { Live } from "./views/live.tsx"
import { Playground } from "./views/playground.tsx"

const AGAIN_MS = 3000

export function App() {
  usePolling(reconnect, AGAIN_MS)
  return (
    <>
      <a class="skip" href="#main">
        Skip to the content
      </a>
      <Header />
      <main id="main" tabIndex={-1}>
        <View />
      </main>
      <Notices />
      <KeyDialog />
    </>
  )
}

function View() {
  const { view, name } = place.value
  if (view === "playground") return <Playground />
  if (view === "live") return <Live />
  return name === null ? <Adapters /> : <AdapterPage key={name} name={name} />
}

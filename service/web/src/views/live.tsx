/** How the server is: what runs, how fast, and in how much memory, over the last five minutes. */

import { useEffect } from "preact/hooks"
import { Batch, Latency, Memory, Requests, Tokens } from "../components/live/charts.tsx"
import { Now } from "../components/live/now.tsx"
import { moments, poll } from "../live/poll.ts"
import "./live.css"

export function Live() {
  useEffect(poll, [])
  return (
    <>
      <h1>Live</h1>
      <Now />
      {moments.value.length > 0 && (
        <div class="charts">
          <Requests />
          <Tokens />
          <Batch />
          <Latency title="Time to the first token" of="first_token_s" />
          <Latency title="Time between tokens" of="inter_token_s" />
          <Latency title="Time of whole requests" of="total_s" />
          <Memory />
        </div>
      )}
    </>
  )
}

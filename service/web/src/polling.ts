/** Doing something again and again, but only while the page is seen. */

import { useEffect, useRef } from "preact/hooks"

/** Calls `act` every so many milliseconds after its last call ended. Hidden pages wait, and catch up when seen. */
export function usePolling(act: () => Promise<unknown>, everyMs: number): void {
  const latest = useRef(act)
  latest.current = act
  useEffect(() => {
    let timer: ReturnType<typeof setTimeout> | undefined
    let stopped = false
    const plan = (delay: number) => {
      clearTimeout(timer)
      if (!stopped && !document.hidden) timer = setTimeout(() => void run(), delay)
    }
    const run = async () => {
      await latest.current()
      plan(everyMs)
    }
    const onVisibility = () => (document.hidden ? clearTimeout(timer) : plan(0))
    document.addEventListener("visibilitychange", onVisibility)
    plan(everyMs)
    return () => {
      stopped = true
      clearTimeout(timer)
      document.removeEventListener("visibilitychange", onVisibility)
    }
  }, [everyMs])
}

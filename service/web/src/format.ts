/** Numbers, sizes and times as people read them. */

const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 })
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 })

export const count = (value: number): string => COUNT.format(value)
export const short = (value: number): string => SHORT.format(value)

export function bytes(value: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"]
  let unit = 0
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000
    unit += 1
  }
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}

export function seconds(value: number): string {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`
  return value < 9.95 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`
}

/** How long ago a Unix time was. */
export function ago(time: number, now: number): string {
  const passed = Math.max(0, now - time)
  if (passed < 5) return "now"
  if (passed < 60) return `${Math.floor(passed)} s ago`
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`
  return `${Math.floor(passed / 86400)} d ago`
}

export const shortDigest = (digest: string): string => digest.replace(/^sha256:/, "").slice(0, 12)

/** How many times plain LoRA's parameters an adapter saves; null where it is plain LoRA itself. */
export function compression(loraParams: number, params: number | null): string | null {
  if (params === null || params <= 0) return null
  const times = loraParams / params
  return `${times < 9.95 ? times.toFixed(1) : COUNT.format(times)}×`
}

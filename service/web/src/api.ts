/** The server's HTTP API: one function a route, typed as its answers are. Errors are ApiErrors, word for word. */

export type AdapterState = "STORED" | "LOADING" | "READY" | "FAILED"

export interface Adapter {
  name: string
  digest: string
  base: string
  created_at: number
  updated_at: number
  state: AdapterState
  reason: string | null
  shared: boolean
  active: boolean
  mode: "switch" | "merge" | null
  file_bytes: number
  resident_bytes: number
  pins: number
  last_used: number | null
  requests: number
  r: number
  num_vectors: number | null
  vector_length: number | null
  topk: number | null
  storage: "topk" | "logits" | "lora"
  vblora_params: number | null
  total_params: number
  lora_params: number
  resumable: boolean
  warnings: string[]
  target_modules: number
  merge_error?: number | null
}

export interface AdapterVersion {
  digest: string
  created_at: number
  file_bytes: number
  current: boolean
  state: AdapterState
}

export interface WeightedName {
  name: string
  weight: number
}

export interface AdapterDetail extends Omit<Adapter, "target_modules"> {
  target_modules: string[]
  config: Record<string, unknown>
  blend: (WeightedName & { digest: string })[] | null
  versions: AdapterVersion[]
}

/** An adapter's parameters by what they are; of plain LoRA, whatever is VB-LoRA's is null. */
export interface Parameters {
  storage: Adapter["storage"]
  vblora_params: number | null
  other_params: number
  total_params: number
  vector_bank_params: number | null
  full_logits_params: number | null
  lora_params: number
  r: number
  summary: string
}

/** Which vectors of the bank a layer's tiles use: each side's row sums to 1. */
export interface BankUsage {
  adapter: string
  digest: string
  num_vectors: number
  vector_length: number
  topk: number
  columns: number
  vectors_per_column: number
  layers: { name: string; A: number[]; B: number[] }[]
  used_vectors: number
  unused_vectors: number
}

export interface Quantiles {
  count: number
  p50: number | null
  p95: number | null
}

/** One moment of the server. What a tenant's key may not know is null. */
export interface Stats {
  time: number
  uptime_s: number
  state: string
  queue_depth: number | null
  running: number | null
  distinct_adapters: number | null
  batch: { selection: string | null; rows: number }[]
  prompt_tokens: number | null
  completion_tokens: number | null
  cached_tokens: number | null
  latency: { first_token_s: Quantiles; inter_token_s: Quantiles; total_s: Quantiles } | null
  memory: {
    process_bytes: number | null // where the operating system does not tell
    device_bytes: number | null
    weight_bytes: number
    kv_bytes: number
    kv_budget_bytes: number
    prefix_bytes: number
    adapter_compact_bytes: number
    adapter_factor_bytes: number
  } | null
  limits: { max_batch_size: number; max_queue: number; max_context: number }
}

export type Task = "generate" | "seq2seq" | "classify" | "embed"

export interface WhoAmI {
  tenant: string
  scopes: ("infer" | "admin")[]
  keys_required: boolean
  task: Task
}

export interface Version {
  version: string
  torch: string
  transformers: string
  model: string
  model_type: string
  dtype: string
  quantization: string | null
  weight_bytes: number
  device: string
  kv_backend: string | null
  task: Task
}

/** What a request runs with: the active adapter, the base, one adapter, or a blend. */
export type Selection = { adapter: string } | { adapters: WeightedName[] } | Record<string, never>

/** A refusal of the server's, with its own words; or that it could not be reached (status 0). */
export class ApiError extends Error {
  readonly status: number
  readonly code: string
  readonly param: string | null
  readonly retryAfter: string | null

  constructor(
    status: number,
    code: string,
    message: string,
    param: string | null,
    retryAfter: string | null,
  ) {
    super(message)
    this.name = "ApiError"
    this.status = status
    this.code = code
    this.param = param
    this.retryAfter = retryAfter
  }
}

export function errorOf(status: number, body: string, retryAfter: string | null = null): ApiError {
  try {
    const { error } = JSON.parse(body) as {
      error: { message: string; code: string; param: string | null }
    }
    if (typeof error.message !== "string") throw new TypeError("not this server's envelope")
    return new ApiError(status, error.code, error.message, error.param, retryAfter)
  } catch {
    const text = body.trim() || "the answer is empty"
    return new ApiError(status, "unknown", `HTTP ${status}: ${text.slice(0, 500)}`, null, retryAfter)
  }
}

/** Whoever sent it: a proxy, a sign-in page, or a connection that was cut in the middle of an answer. */
export const brokenAnswer = (): ApiError =>
  new ApiError(0, "unreachable", "The answer broke off, or is not one of the server's.", null, null)

const isAbort = (error: unknown): boolean => error instanceof DOMException && error.name === "AbortError"

/** Longer than a server takes that is only busy: one that stands still would be waited for without a word. */
const LOOK_MS = 30_000
const STATS_MS = 10_000

/** Where the API is: beside the page, under whatever prefix a proxy gave both. */
export const BASE = new URL(".", location.href)

export class Client {
  #key: string | null

  constructor(key: string | null) {
    this.#key = key
  }

  get headers(): Record<string, string> {
    return this.#key === null ? {} : { Authorization: `Bearer ${this.#key}` }
  }

  url(path: string): string {
    return new URL(path.replace(/^\//, ""), BASE).href
  }

  /** The response, its body unread; ApiError unless it is a success. */
  async fetch(path: string, init: RequestInit = {}): Promise<Response> {
    let response: Response
    try {
      response = await fetch(this.url(path), { ...init, headers: { ...this.headers, ...init.headers } })
    } catch (error) {
      if (isAbort(error)) throw error
      const late = error instanceof DOMException && error.name === "TimeoutError"
      const message = late ? "The server does not answer." : "The server cannot be reached."
      throw new ApiError(0, "unreachable", message, null, null)
    }
    if (!response.ok) {
      const text = await response.text().catch(() => "")
      throw errorOf(response.status, text, response.headers.get("Retry-After"))
    }
    return response
  }

  async json<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
    const init: RequestInit = { method }
    if (signal) init.signal = signal
    if (body !== undefined) {
      init.body = JSON.stringify(body)
      init.headers = { "Content-Type": "application/json" }
    }
    const response = await this.fetch(path, init)
    if (response.status === 204) return undefined as T
    try {
      return (await response.json()) as T
    } catch (error) {
      throw isAbort(error) ? error : brokenAnswer()
    }
  }

  /** Something that is asked for again and again. */
  look<T>(path: string, withinMs = LOOK_MS): Promise<T> {
    return this.json<T>("GET", path, undefined, AbortSignal.timeout(withinMs))
  }

  version = () => this.look<Version>("version")
  whoAmI = () => this.look<WhoAmI>("v1/whoami")
  stats = () => this.look<Stats>("v1/stats", STATS_MS)

  adapters(limit: number, after: string | null): Promise<{ data: Adapter[]; next: string | null }> {
    const query = new URLSearchParams({ limit: String(limit) })
    if (after !== null) query.set("after", after)
    return this.look(`v1/adapters?${query}`)
  }

  adapter = (name: string) => this.look<AdapterDetail>(`v1/adapters/${encodeURIComponent(name)}`)

  bank(name: string, columns: number): Promise<BankUsage> {
    return this.json("GET", `v1/adapters/${encodeURIComponent(name)}/bank?columns=${columns}`)
  }

  parameters = (name: string) =>
    this.json<Parameters>("GET", `v1/adapters/${encodeURIComponent(name)}/parameters`)

  activate(name: string, mode: "switch" | "merge"): Promise<Adapter> {
    return this.json("POST", `v1/adapters/${encodeURIComponent(name)}/activate`, { mode })
  }

  deactivate = (name: string) =>
    this.json<Adapter>("POST", `v1/adapters/${encodeURIComponent(name)}/deactivate`)
  remove = (name: string) => this.json<void>("DELETE", `v1/adapters/${encodeURIComponent(name)}`)

  rollback(name: string, digest: string): Promise<Adapter> {
    return this.json("POST", `v1/adapters/${encodeURIComponent(name)}/rollback`, { digest })
  }

  blend(name: string, adapters: WeightedName[]): Promise<Adapter> {
    return this.json("POST", "v1/blends", { name, adapters })
  }
}

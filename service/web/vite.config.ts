import { defineConfig } from "vite"

// `npm run dev` proxies the API to a server of your own: VBLORA_URL=http://127.0.0.1:8000 npm run dev
const server = process.env["VBLORA_URL"] ?? "http://127.0.0.1:8000"
const routes = [
  "/v1",
  "/version",
  "/healthz",
  "/readyz",
  "/metrics",
  "/tokenize",
  "/detokenize",
  "/docs",
  "/openapi.json",
]

export default defineConfig({
  base: "./", // the page works under any prefix that a proxy gives it
  publicDir: false, // all of it is in the assets, hashed
  build: {
    outDir: "dist",
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  server: { proxy: Object.fromEntries(routes.map((route) => [route, server])) },
})

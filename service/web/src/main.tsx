import { render } from "preact"
import { App } from "./app.tsx"
import { connect } from "./state.ts"
import "./style.css"
import "./theme.ts"

void connect()
const root = document.getElementById("app")
if (root) render(<App />, root)

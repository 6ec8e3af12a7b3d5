"""Measurements of the engine against its targets. `docs/benchmarks.md` says how to run them and what they said."""

"""The engine: one thread that owns the model and answers requests with any mix of adapters in one batch."""

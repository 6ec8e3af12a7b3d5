"""Pure ASGI middleware, outermost first: context (request id, access log), auth, body (size and deadline)."""

"""Pure ASGI middleware, outermost first.

context (request id, access log) → cors → uncaught (errors) → pages (of other sites) → auth → body (size and deadline)
"""

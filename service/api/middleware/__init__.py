"""Pure ASGI middleware, outermost first.

context (request id, access log) → cors → uncaught (errors) → auth → body (size and deadline)
"""

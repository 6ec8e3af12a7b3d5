"""The HTTP layer: requests in, the store, the registry and the engine asked, one error envelope out."""

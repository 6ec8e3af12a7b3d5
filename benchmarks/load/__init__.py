"""A load for a running server, that accounts for every request: what is asked, who asks, what the server then holds."""

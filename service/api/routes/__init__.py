"""One router for each group of routes."""

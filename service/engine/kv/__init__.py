"""Key-value state of the running rows: a fast backend in slots, and a general one for what the fast one cannot do."""

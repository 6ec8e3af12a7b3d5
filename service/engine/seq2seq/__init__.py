"""Encoders and decoders: a text is read once, and another one written token by token."""

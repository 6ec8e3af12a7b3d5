"""Texts that are read once: classification by heads that adapters bring, and embeddings."""

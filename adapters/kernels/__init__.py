"""Kernels for the low-rank part of a decode step on a GPU. Importing this package needs no Triton; `delta` loads it."""

"""Decode steps of static shapes, captured at load and replayed: on CUDA a step then costs one launch."""

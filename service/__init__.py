"""vblora-serve: the merge-and-serve web service for VB-LoRA adapters."""

__version__ = "0.1.0"

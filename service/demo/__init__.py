"""The demo kept in the package: a small base model, VB-LoRA adapters of it, and the styles they write in."""

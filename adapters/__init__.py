"""VB-LoRA itself: reading, composing, blending and merging adapters. Knows torch and safetensors, nothing of HTTP."""

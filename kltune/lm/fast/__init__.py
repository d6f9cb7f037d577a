"""Faster ways to the same numbers: decoding, CUDA graphs, LoRA, shared prefixes, memory."""

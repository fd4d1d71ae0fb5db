"""How DeepSeek-V4 is computed: one folder per operation.

The door (`__init__`) of a folder checks shapes, picks a backend and calls it; `ref.py` is the truth in plain torch, and
faster siblings (`cpu.py`, `gpu.py`) have its signature and must match its numbers. Weights may be packed
(`dsv4_quant.formats.Packed`) or plain tensors; activations are tensors with one row per token.
"""

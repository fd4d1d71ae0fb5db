"""What the bytes of a DeepSeek-V4 checkpoint mean: number formats, the schema of tensors, and the files they lie in."""

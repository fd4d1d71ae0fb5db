"""DeepSeek-V4, top to bottom: weights bound to fields once, the forward pass, and the state that a timeline carries."""

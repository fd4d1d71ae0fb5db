"""The chat format: messages to ids (template, tokenizer) and completions back to messages (parser). No torch here."""

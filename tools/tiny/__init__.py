"""How the embedded model `tiny` is made: data, tokenizer, training, export and evaluation."""

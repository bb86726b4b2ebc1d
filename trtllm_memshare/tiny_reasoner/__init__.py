"""The bundled model: its task, its tokenizer and its training."""

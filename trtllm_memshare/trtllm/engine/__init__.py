"""TensorRT-LLM engines with MemShare inside: what they take and give, how they are built, what is refused."""

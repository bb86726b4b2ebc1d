"""Block pool, block tables in TensorRT-LLM's encoding, and the manager that applies remaps."""

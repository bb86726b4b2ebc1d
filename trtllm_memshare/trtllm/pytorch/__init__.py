"""TensorRT-LLM's PyTorch backend: sharing by tail swap through the KV cache manager's public calls."""

"""KV-cache sharing for reasoning models on TensorRT-LLM (MemShare, arXiv 2507.21433)."""

__version__ = "0.1.0"

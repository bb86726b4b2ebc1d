"""Runs any Hugging Face decoder over a pool in TensorRT-LLM's layout, on the CPU or a CUDA device."""

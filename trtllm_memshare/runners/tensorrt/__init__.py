"""Runs a TensorRT-LLM engine through TensorRT's own API, in flight, over a pool of ours."""

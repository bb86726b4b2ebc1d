"""Requests, in-flight batching, the executor loop, sampling and statistics."""

"""What runs a model's step over the paged cache: one protocol, a torch runner, a TensorRT runner."""

"""Everything that touches TensorRT-LLM's own classes; imports them lazily, behind one probe."""

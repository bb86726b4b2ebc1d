"""Tolerances of the tests, each with its reason."""

FLOAT32_SUM = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of a few thousand terms in different orders."""

SAME_LOGITS = {"rtol": 1e-4, "atol": 1e-4}
"""Two float32 attention implementations over a few layers; logits of the test models are of order 1 to 10."""

KERNEL_RELATIVE_ERROR = 1e-5
"""float32 sums of squares against float64, relative to the newer side's norm."""

DECODE_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "float8_e4m3fn": 2e-2}
"""Decode attention against float64, absolute and relative, values of order 1: weights are rounded to the compute dtype
before they meet V (fp16: 2^-11, bf16: 2^-8), fp8 pools compute in bf16."""

SIGNATURE_ERROR = {"rtol": 1e-4, "atol": 2e-6}
"""Float32 sums of a few thousand products in two orders, brought to length 1."""

SIGNATURE_FLOAT64_ERROR = 2e-6
"""One number of a signature, whose length is 1, against float64; angles of 32,000 radians are part of it."""

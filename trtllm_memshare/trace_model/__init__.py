"""A small language model of real reasoning text: the committed traces, their split, and its training."""

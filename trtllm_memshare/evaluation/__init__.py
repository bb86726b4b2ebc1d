"""Compares: data sets, variants, controls, the benchmark driver, replays token by token and masked, curves."""

"""Compares: data sets, variants, controls, the benchmark driver, replays, curves, calibration."""

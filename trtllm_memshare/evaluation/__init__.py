"""Experiments on quality: data sets, variants, controls, replays token by token and masked, curves, calibration."""

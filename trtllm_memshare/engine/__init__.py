"""Engine directories: what `build_engine.py` writes and the runners read."""

"""How much sharing costs in answers and in next-token distributions, against the memory it frees, and calibration."""

"""What sharing costs in answers and next-token distributions against memory, what it can reach, and calibration."""

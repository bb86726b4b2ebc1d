"""Agreement between the processes of one engine, and how they reach each other."""

"""How far sharing moves a model away from its full cache, and how much of a text sharing can reach."""

"""Command lines: each module parses, calls and prints; what they call stands in the other rooms."""

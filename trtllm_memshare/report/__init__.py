"""Tables and pictures of benchmark reports."""

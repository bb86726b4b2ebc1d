"""Finds KV blocks that repeat earlier ones: segmentation, stage 1 (lexical), stage 2 (KV distance), policy."""

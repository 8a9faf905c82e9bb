"""The matrix room: the same tokens as transformers' default cache."""

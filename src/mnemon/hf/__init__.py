"""What transformers calls things: the one room that knows its moving surface."""

"""Caching methods, one file each; `registry` knows them by name."""

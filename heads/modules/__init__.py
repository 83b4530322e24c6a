"""Heads: modules that map features to vertices."""

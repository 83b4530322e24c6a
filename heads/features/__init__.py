"""Cached features as heads read them."""

"""Losses to train by and metrics to report."""

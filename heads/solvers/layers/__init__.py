"""Closed form on several layers at once, under priors over places and depths."""

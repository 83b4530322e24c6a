"""Feature stores in, prediction stores and weights of heads out."""

"""Prediction stores in, blended predictions, scores and a submission out."""

"""Predictions for new images, from a work folder or from a folder to hand on."""

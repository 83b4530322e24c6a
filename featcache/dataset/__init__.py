"""What was shown and what was measured: images, responses, ROIs, noise ceilings, folds."""

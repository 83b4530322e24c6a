"""What was shown and what was measured: subjects, their images, responses, ROIs and noise ceilings."""

"""One HTML page of what a work folder has: scores, maps, learning curves, pictures and what was run."""

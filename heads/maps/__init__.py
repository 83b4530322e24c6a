"""Where in the image, and in which layers, heads look."""

"""Networks that read images: their weights, their layers, and checkpoints of trained ones."""

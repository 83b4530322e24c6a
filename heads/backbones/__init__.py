"""Training of backbones together with heads."""

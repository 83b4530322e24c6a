"""Images in, cached feature rows out."""

__version__ = "0.1.0"

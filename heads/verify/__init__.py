"""Whether a work folder is as it was written, and what is to be done where it is not."""

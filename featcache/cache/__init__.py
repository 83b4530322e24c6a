"""Rows on the disk: one Zarr format, decoded images, and the extraction of features."""

"""How heads are fitted, out of fold: one solver a file, and one table of them."""

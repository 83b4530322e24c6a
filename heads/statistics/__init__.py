"""How sure scores are: intervals, p values and false discovery rate; and the long table of all scores."""

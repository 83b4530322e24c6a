"""Feature spaces against each other: how much of a vertex only one of them explains, and how much they share."""

"""Small worlds in which everything is known, to hold every bound of ``core`` against the truth."""

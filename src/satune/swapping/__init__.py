"""``satune swap``: from the request to the new directory, over ``swap`` and everything else."""

"""The recipe: its keys, how it is read, and what must hold between the keys."""

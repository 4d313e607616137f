"""From what a user asks for to a thing that runs."""

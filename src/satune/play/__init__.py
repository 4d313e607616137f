"""Playing: one conversation, many of them, and the figures of what was played."""

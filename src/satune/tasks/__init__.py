"""Tasks: one file a task or benchmark. ``catalog.load_task`` finds them by name."""

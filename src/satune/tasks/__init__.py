"""Tasks: a file, or a folder, a task or benchmark. ``catalog.load_task`` finds them by name."""

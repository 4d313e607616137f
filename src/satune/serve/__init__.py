"""A team behind an OpenAI-compatible endpoint, and in a chat. ``app`` shows the whole of it."""

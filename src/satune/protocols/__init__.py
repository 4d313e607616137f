"""Protocols: who speaks when. ``catalog.load_protocol`` finds them by name."""

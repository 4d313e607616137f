"""Protocols: who speaks when. ``named.load_protocol`` finds them by name."""

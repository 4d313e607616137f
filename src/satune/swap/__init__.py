"""Giving a seat to another model inside a trust region (THEORY §7)."""

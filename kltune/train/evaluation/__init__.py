"""Held-out measurements of a run, what they warn of, and how it ends."""

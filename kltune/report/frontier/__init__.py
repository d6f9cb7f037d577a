"""Reward against KL over many runs."""

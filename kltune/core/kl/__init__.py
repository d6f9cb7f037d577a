"""Divergences and their errors: of tokens, of whole responses, cut distributions, gates."""

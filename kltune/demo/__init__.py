"""The whole walk on a language model made on the spot."""

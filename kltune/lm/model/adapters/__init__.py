"""Adapters on a model: what they are made of, and how saved ones are put on it, switched and merged."""

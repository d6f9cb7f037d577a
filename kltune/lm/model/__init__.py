"""A causal language model as policy and reference, and what is sampled from it and measured on it."""

"""kltune: fine-tune language models while holding their KL divergence from a reference to a budget."""

__version__ = "0.1.0"

"""Signs that a reward is being exploited: over-optimization, lost diversity, and what detects them."""

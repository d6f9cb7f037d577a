"""One file per algorithm, readable alone from top to bottom; they never import each other."""

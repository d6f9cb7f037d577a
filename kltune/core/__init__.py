"""Pure tensor code: no model, no file, no recipe, no print."""

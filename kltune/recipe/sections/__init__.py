"""What a recipe may say, section by section: the types of values, what stages share, what a method has of its own."""

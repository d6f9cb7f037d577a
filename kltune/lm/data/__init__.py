"""From a file to token ids: rows, their forms, encoding, examples, preference pairs."""

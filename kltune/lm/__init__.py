"""All that touches a language model or a tokenizer."""

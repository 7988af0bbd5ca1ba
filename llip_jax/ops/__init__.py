"""Array functions with a plain reference."""

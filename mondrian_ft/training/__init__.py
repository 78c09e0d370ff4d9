"""The training loop and what it is made of. Takes values, never a config."""

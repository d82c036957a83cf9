"""Training: what happens between the first and the last step."""

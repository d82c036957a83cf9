"""Studies: a recipe and axes, as runs one after another, and what they come to."""

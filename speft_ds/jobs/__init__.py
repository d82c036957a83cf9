"""Jobs: what a launched process checks and does."""

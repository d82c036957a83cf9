"""Choice of the mask."""

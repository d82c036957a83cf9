"""Jobs of the launched processes."""

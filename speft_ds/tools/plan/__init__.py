"""What a run will need: `speft plan`."""

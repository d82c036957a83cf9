"""Tools beside training: the plan of a run."""

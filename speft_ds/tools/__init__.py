"""Commands beside training: `speft doctor`, `speft quickstart`."""

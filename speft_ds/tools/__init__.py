"""Commands beside training: `speft plan`, `speft doctor`, `speft quickstart`."""

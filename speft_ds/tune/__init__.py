"""Finding settings: a learning-rate range test, a search over recipe keys."""

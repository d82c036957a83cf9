"""lm-eval on the live, sharded engine: before, during and after training, and on finished runs."""

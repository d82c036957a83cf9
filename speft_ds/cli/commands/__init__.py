"""What the `speft` command does, one module a command."""

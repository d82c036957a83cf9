"""The sparse trainable state."""

"""Training: optax for the steps, orbax for the state."""

"""The ways from partials to the next state."""

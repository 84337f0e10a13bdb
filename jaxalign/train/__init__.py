"""Alignment: losses, log-probabilities, the step and the loop."""

"""Which rows to train on: the mixture, the samplers, their report."""

"""Which rows of the pool to train on: the mixture, the samplers, the report of a selection."""

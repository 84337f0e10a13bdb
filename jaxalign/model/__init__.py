"""Models: one parameter table, one forward pass, weights in and out."""

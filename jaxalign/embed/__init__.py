"""The forward passes over a pool, and the store that keeps them."""

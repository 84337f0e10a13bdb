"""Data-efficient alignment of language models, on a JAX device mesh."""

__version__ = "0.1.0"

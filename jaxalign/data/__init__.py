"""Human judgments in; checked records, token ids and batches out."""

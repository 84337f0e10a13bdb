"""Evidence: held-out measures, win rates and their intervals."""

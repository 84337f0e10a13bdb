"""What every room stands on: errors, configs, artifacts, statistics."""

"""Reports: one HTML file per job, no script, nothing loaded from elsewhere."""

"""Reports: jinja templates over a job's JSON, one HTML file each."""

"""The stages of a job, a file each; `pipeline` knows their order."""

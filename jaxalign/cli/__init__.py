"""The commands: flags in, an exit code out."""

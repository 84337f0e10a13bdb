"""Judges that are not the built-in world: a model behind an endpoint."""

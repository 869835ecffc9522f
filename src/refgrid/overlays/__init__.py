"""Libraries laid over a machine's own torch, from a wheelhouse."""

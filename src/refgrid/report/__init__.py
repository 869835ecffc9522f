"""Records shown as the compatibility matrix."""

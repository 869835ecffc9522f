"""The commands of `refgrid`, one module a topic."""

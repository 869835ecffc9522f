"""Kernels compiled ahead of a run."""

"""Kernels of our own, held against refgrid's references; each in a package of its own."""

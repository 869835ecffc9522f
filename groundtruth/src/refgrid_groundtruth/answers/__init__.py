"""Tiny cases of each op whose answers are known by hand: one module a family, `CASES` by op."""

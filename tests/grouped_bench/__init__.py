"""How fast grouped attention is, and beside what: `nox -s bench-grouped`, or `python -m grouped_bench` below tests/."""

"""Sizes of the kernels' tiles. Which of them compile without spills, `resources` says; which are fast, only a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Rows of q and keys of a tile, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


class Configuration(NamedTuple):
    """The tiles of the forward kernel, of the one for gradients of rows, and of the one for those of keys."""

    forward: Tiles
    of_rows: Tiles
    of_keys: Tiles


# By head_dim. On an H200 the fastest of those in tests/bench_triton.py, over three layouts together.
TABLE = {
    64: Configuration(Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
    128: Configuration(Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
}

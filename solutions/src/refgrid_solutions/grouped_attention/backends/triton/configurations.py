"""Sizes of the kernels' tiles. Which of them compile without spills, `resources` says; which are fast, only a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Rows of q and keys of a tile, warps of a program, stages of its loads, programs that a processor holds."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int = 1

    def grid(self, items: int, device: torch.device) -> tuple[int]:
        """As many programs as the device holds at a time, no more than there are items."""
        processors = 1
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        return (min(items, self.resident * processors),)


class Configuration(NamedTuple):
    """The tiles of the forward kernel, of the one for gradients of rows, and of the one for those of keys."""

    forward: Tiles
    of_rows: Tiles
    of_keys: Tiles


# By head_dim.
TABLE = {
    64: Configuration(Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2), Tiles(64, 128, 8, 3)),
    128: Configuration(Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 2), Tiles(64, 128, 8, 2)),
}

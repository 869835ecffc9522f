"""The problems that are timed: which rows see which keys, with the heads of real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

# As in refgrid_solutions.grouped_attention, which would bring torch: tables are rendered without it.
FULL, CAUSAL = 0, 1
HEAD_DIM = 128
HEADS = {"8B": (32, 8), "70B": (64, 8)}  # Llama3's query and key heads
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)

Piece = tuple[int, int, int, int, int]  # rows, keys, mask of a slice


@dataclass(frozen=True)
class Shape:
    """One problem. `tokens` is the length of the whole sequence or of the keys; world 0 where nothing is dealt out."""

    name: str
    kind: str
    model: str
    tokens: int
    heads: tuple[int, int]
    pieces: tuple[Piece, ...]
    world: int = 0
    rank: int = 0
    stride: int = 0

    @property
    def total_q(self) -> int:
        """Rows of q."""
        return max(piece[1] for piece in self.pieces)

    @property
    def total_k(self) -> int:
        """Keys that some slice reads."""
        return max(piece[3] for piece in self.pieces)

    @property
    def key_bytes(self) -> tuple[int, int]:
        """Bytes of k and v, 16-bit: each key once (the union), and once for every slice that reads it."""
        each = 4 * HEAD_DIM * self.heads[1]
        union, end = 0, 0
        for start, stop in sorted((piece[2], piece[3]) for piece in self.pieces):
            union, end = union + max(0, stop - max(start, end)), max(end, stop)
        return each * union, each * sum(piece[3] - piece[2] for piece in self.pieces)


def zigzag(model: str, tokens: int, world: int, rank: int, stride: int = 0) -> Shape:
    """A rank's rows of one causal sequence; stride key heads a call, 0 for all of them."""
    chunk, (query_heads, key_heads) = tokens // (2 * world), HEADS[model]
    taken = stride or key_heads
    late = 2 * world - rank
    pieces = ((0, chunk, 0, (rank + 1) * chunk, CAUSAL), (chunk, 2 * chunk, 0, late * chunk, CAUSAL))
    name = f"zigzag-{model}-{tokens // 1024}K-w{world}-r{rank}" + (f"-s{stride}" if stride else "")
    heads = (taken * query_heads // key_heads, taken)
    return Shape(name, "zigzag", model, tokens, heads, pieces, world, rank, stride)


def prefixes(groups: int, rows: int, heads: tuple[int, int]) -> Shape:
    """Groups of rows of one sequence, each of which sees all up to itself."""
    pieces = tuple((n * rows, (n + 1) * rows, 0, (n + 1) * rows, CAUSAL) for n in range(groups))
    return Shape(f"groups-{groups}x{rows}-h{heads[0]}", "many groups", "8B", groups * rows, heads, pieces)


def shared(groups: int, rows: int, keys: int) -> Shape:
    """Groups of a few rows that all see the same keys."""
    pieces = tuple((n * rows, (n + 1) * rows, 0, keys, FULL) for n in range(groups))
    return Shape(f"shared-{groups}x{rows}-{keys // 1024}K", "shared keys", "8B", keys, HEADS["8B"], pieces)


def imbalanced() -> Shape:
    """100 rows beside 9,900."""
    pieces = ((0, 100, 0, 100, CAUSAL), (100, 10000, 0, 10000, CAUSAL))
    return Shape("imbalanced-100-9900", "imbalanced", "8B", 10000, HEADS["8B"], pieces)


def shapes() -> Iterator[Shape]:
    """All that is timed by default, small ones first within a kind."""
    for model, tokens, world in product(HEADS, TOKENS, (1, 2, 4, 8)):
        for rank in dict.fromkeys((0, world - 1)):
            yield zigzag(model, tokens, world, rank)
    for tokens, world in product(TOKENS[:4], (1, 8)):
        for rank in dict.fromkeys((0, world - 1)):
            yield zigzag("8B", tokens, world, rank, stride=1)
    for groups, rows, query_heads in product((8, 16), (512, 1024, 2048), (8, 32)):
        yield prefixes(groups, rows, (query_heads, query_heads // 4))
    for rows in (1, 4, 16):
        yield shared(16, rows, 65536)
    yield imbalanced()

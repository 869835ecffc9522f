"""Times of several ways to do one thing, in turns, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from grouped_bench.report import FEWEST_RESAMPLED

_SAMPLE_MS = 1.0  # calls of one sample take about so long: an event's own resolution is 0.5 us
_DRAWS = 400


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, an entry a round; rounds of all ways of one measurement belong together."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the rounds."""
        return min(self.rounds), max(self.rounds)

    def speedup(self, over: Times) -> tuple[float, float, float]:
        """How often this fits into the other: the median over rounds, and where it lies in 95 % of resamples.

        Of few rounds, the lowest and the highest.
        """
        ratios = [theirs / mine for mine, theirs in zip(self.rounds, over.rounds, strict=True)]
        if len(ratios) < FEWEST_RESAMPLED:
            return statistics.median(ratios), min(ratios), max(ratios)
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_DRAWS))
        return statistics.median(ratios), medians[_DRAWS // 40], medians[-1 - _DRAWS // 40]


def in_turns(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Times]:
    """Eager calls: what the host takes to launch counts where the device waits for it."""
    return _in_turns(ways, device, rounds)


def replayed(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Times]:
    """The same as CUDA graphs: no host in between."""
    graphs = {name: _captured(call) for name, call in ways.items()}
    return _in_turns({name: graph.replay for name, graph in graphs.items()}, device, rounds)


def _in_turns(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Times]:
    counts = {name: _calls_a_sample(call, device) for name, call in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(ways), len(ways)):
            found[name].append(_sample(ways[name], counts[name], device))
    return {name: Times(tuple(times)) for name, times in found.items()}


def _calls_a_sample(call: Callable[[], object], device: torch.device) -> int:
    """What takes less than a sample is warmed and looked at three times: one call of it says little."""
    _sample(call, 1, device)
    if (took := _sample(call, 1, device)) < _SAMPLE_MS:
        _sample(call, 3, device)
        took = _sample(call, 3, device)
    return max(1, min(100, round(_SAMPLE_MS / max(took, 1e-3))))


def _sample(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds a call."""
    if device.type != "cuda":
        started = time.perf_counter()
        _repeat(call, calls)
        return 1e3 * (time.perf_counter() - started) / calls
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    _repeat(call, calls)
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / calls


def _repeat(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm on a stream of its own first, as a capture demands; once, as the call was made before."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph

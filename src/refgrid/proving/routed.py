"""Which expert wrong rows went through: of a mixture of experts they are no axis of the output, so no index shows it.

The reference chooses them, and returns what `mix_experts(weight, expert, ...)` makes of its choice. Given a function of
that name which makes nothing of it, it returns the choice.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb

import torch

from refgrid.dataset.reference import compile_reference
from refgrid.proving.workbench import Laid

_MIXES = "\n\ndef mix_experts("
_CHOICE = f"{_MIXES}weight, expert, *_):\n    return expert\n"
_CHANCE = 0.01  # with which as many rows, taken at random, would be told as those of an expert


def chosen_experts(bench: Laid) -> torch.Tensor | None:
    """The experts of each row, [rows, top_k], as the weights number them; None for an op without experts."""
    definition = bench.definition
    if _MIXES not in definition.reference:
        return None
    told, text = f"{definition.name}, up to its choice", definition.reference + _CHOICE
    choose = compile_reference(replace(definition, name=told, reference=text))
    expert: torch.Tensor = choose(*bench.inputs.tensors.values())
    return expert


def told_expert(wrong: torch.Tensor, experts: torch.Tensor) -> str:
    """The expert whose rows the wrong ones are, or are among; empty where that may be by chance.

    wrong [rows] bool, experts [rows, top_k].
    """
    count = int(wrong.sum())
    ways = comb(len(wrong), count)
    went = {int(e): (experts == e).any(1) for e in experts.unique() if e >= 0}
    sizes = {e: int(through.sum()) for e, through in went.items()}
    fitting = [e for e, through in went.items() if through[wrong].all()]
    expert = min(fitting, key=sizes.__getitem__, default=-1) if count else -1
    if expert >= 0 and sizes[expert] == count and list(sizes.values()).count(count) / ways <= _CHANCE:
        return f"the {count} wrong rows are all those of expert {expert}"
    if expert >= 0 and sum(comb(size, count) for size in sizes.values()) / ways <= _CHANCE:
        return f"the {count} wrong rows are among the {sizes[expert]} of expert {expert}"
    return ""

"""Which builder makes which input: by the definition's op_type and the field's names for inputs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from refgrid.inputs import paged, plain

if TYPE_CHECKING:
    from refgrid.inputs.drawing import Drawing, Value

    Builder = Callable[[Drawing, str], Value]


class Rule(NamedTuple):
    """Inputs whose op_type and name fit both globs are made by `build`.

    `of_workload`: it looks at the workload or at other inputs, so that even a tensor of constant shape is no weight.
    """

    op_type: str
    name: str
    build: Builder
    of_workload: bool = False


# The first rule that fits makes the input, and inputs are made in the order of their rules: builders look at those
# made before.
RULES: tuple[Rule, ...] = (
    Rule("*", "qo_indptr", paged.qo_indptr, of_workload=True),
    Rule("*", "kv_indptr", paged.kv_indptr, of_workload=True),
    Rule("*", "kv_indices", paged.kv_indices, of_workload=True),
    Rule("*", "kv_last_page_len", paged.kv_last_page_len, of_workload=True),
    Rule("*", "[kv]_cache", paged.paged_cache, of_workload=True),
    Rule("*", "ckv_cache", paged.paged_cache, of_workload=True),
    Rule("*", "kpe_cache", paged.paged_cache, of_workload=True),
    Rule("*", "B", plain.gemm_weight),
    Rule("*", "*", plain.plain),
)


def rule_of(op_type: str, name: str) -> Rule:
    """The rule that makes an input."""
    return RULES[turn(op_type, name)]


def turn(op_type: str, name: str) -> int:
    """The place of the rule that makes an input."""
    fits = (fnmatchcase(op_type, rule.op_type) and fnmatchcase(name, rule.name) for rule in RULES)
    return next(place for place, fit in enumerate(fits) if fit)

"""Who can run what. A backend is a module of four functions, imported when it is first asked for.

    refuses(plan) -> str                                     why it cannot run the plan; empty if it can
    metadata(plan, both) -> sequence of tensors              what it needs on the device (or the CPU), made once a plan:
                                                             for both passes, or for the forward pass alone
    forward(q, k, v, plan, scale) -> (out, lse)              lse [num_heads_q, total_q], natural logarithm
    backward(dout, q, k, v, out, lse, plan, scale) -> (dq, dk, dv)

plan.metadata(name) gives a backend what its metadata made. Inside forward and backward it is there already: they copy
nothing from or to the host and read no tensor's values there, metadata on the CPU excepted. They run no other backend's
kernels unless their row of the table says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from refgrid_solutions.grouped_attention.predicted import few_tiles

if TYPE_CHECKING:
    from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan

HALVES = (torch.float16, torch.bfloat16)
WRITTEN_FOR = (64, 128)


@dataclass(frozen=True)
class Row:
    """One backend: where it is, what must be installed for it, and what it can run."""

    module: str
    says: str
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = HALVES
    head_dims: tuple[int, ...] = WRITTEN_FOR


class Backend(Protocol):
    """The module of a backend."""

    refuses: Callable[[GroupedAttnPlan], str]
    metadata: Callable[[GroupedAttnPlan, bool], Sequence[torch.Tensor]]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


# In the order in which "auto" asks them where no gradient will be needed: as fast as they were found to be on an H200
# (results/grouped, as graphs), which a test holds against this.
TABLE = {
    "fa3": Row(
        "fa3",
        "FlashAttention-3 of the fa3-fwd wheel forward, PyTorch's FlashAttention-2 backward",
        needs=("fa3_fwd",),
        dtypes=(torch.bfloat16,),  # its float16 kernels were left out of the wheel
    ),
    "triton": Row(
        "triton",
        "kernels of our own in Triton, forward and backward",
        needs=("triton",),
        devices=("cuda", "cpu"),  # on a CPU by Triton's interpreter; the module knows whether that is on
    ),
    "torch": Row("aten", "PyTorch's FlashAttention-2, forward and backward", head_dims=(*WRITTEN_FOR, 256)),
    "cuda": Row("", "kernels of our own in CUDA C++: not written yet"),
    "reference": Row(
        "naive",
        "the formula, blocked over rows, in float32 (float64 for float64)",
        devices=(),
        dtypes=(*HALVES, torch.float32, torch.float64),
        head_dims=(),
    ),
}

# Whom "auto" asks first where a gradient will be needed, but where there are few tiles: its backward kernels take less
# time than PyTorch's, as long as they fill the GPU. PyTorch's deterministic ones were not timed.
_FASTEST_BACKWARD = "triton"


def refusal(name: str, plan: GroupedAttnPlan) -> str:
    """Why the backend cannot run the plan; empty if it can. ValueError if there is none of this name."""
    if name not in TABLE:
        raise ValueError(f"backend = {name!r}, but should be auto or one of: {', '.join(TABLE)}")
    row = TABLE[name]
    return _out_of_reach(row) or _out_of_range(row, plan) or load(name).refuses(plan)


def choose(plan: GroupedAttnPlan) -> tuple[str, str]:
    """Which of those that can run the plan is fastest without gradients, and with them; on a CPU the reference."""
    if plan.device.type == "cpu" and not refusal("reference", plan):
        return "reference", "reference"
    backward = TABLE if few_tiles(plan) and not plan.deterministic else dict.fromkeys([_FASTEST_BACKWARD, *TABLE])
    return _first(TABLE, plan), _first(backward, plan)


@cache
def say(chosen: tuple[str, str]) -> None:
    """Log what "auto" is, once a process for each choice: the list form and zigzag show no plan that tells it."""
    told = "backend = 'auto' is %r where no gradient is needed, and %r where one is"
    logging.getLogger(__name__.partition(".")[0]).info(told, *chosen)


def _first(names: Iterable[str], plan: GroupedAttnPlan) -> str:
    """That can run the plan."""
    for name in names:
        if not refusal(name, plan):
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons(plan).items())
    raise ValueError(f"no backend can run this: {told}")


def reasons(plan: GroupedAttnPlan) -> dict[str, str]:
    """Of every backend, why it cannot run the plan; empty where it can."""
    return {name: refusal(name, plan) for name in TABLE}


def load(name: str) -> Backend:
    """The backend's module, imported now."""
    return cast("Backend", _module(TABLE[name]))


def _module(row: Row) -> ModuleType:
    return importlib.import_module(f"{__name__}.{row.module}")


def _out_of_reach(row: Row) -> str:
    """What is not installed here. A library that is installed and breaks is an error, not a reason."""
    if not row.module:
        return "it is not written yet"
    missing = [name for name in (*row.needs, f"{__name__}.{row.module}") if not _is_installed(name)]
    return f"{', '.join(missing)} is not installed" if missing else ""


@cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _out_of_range(row: Row, plan: GroupedAttnPlan) -> str:
    """What the row excludes; a row without devices or head_dims takes any."""
    if row.devices and plan.device.type not in row.devices:
        return f"device = {plan.device}, but should be on {' or '.join(row.devices)}"
    if plan.dtype not in row.dtypes:
        return f"dtype = {plan.dtype}, but should be one of: {', '.join(map(str, row.dtypes))}"
    if row.head_dims and plan.head_dim not in row.head_dims:
        return f"head_dim = {plan.head_dim}, but should be one of: {', '.join(map(str, row.head_dims))}"
    return ""

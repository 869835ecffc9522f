"""Our own kernels as sources of the instrument: each backend of grouped attention is held against its reference.

An entry point of `refgrid.sources` names this module. The backend "reference" is no source: it is the formula of the
definition's reference in float32 over again, so their agreement would show nothing of a kernel. Nothing here proves a
kernel before it serves: a wrong one shall end in a mismatch, not be left out.

Importing this imports no torch and no backend.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

OP = "gqa_grouped"
OLDEST_TORCH = (2, 8)  # before it custom ops and torch.compiler lack what the interface needs; as in pyproject.toml
_PACKAGE = "refgrid_solutions.grouped_attention"


class Unavailable(Exception):
    """A backend cannot serve here: `verdict` is missing, import-fail or unsupported, `reason` says why."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(verdict, reason)
        self.verdict, self.reason = verdict, reason

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """One backend: the library that it needs, the distribution whose version tells of it, and whose kernels run."""

    name: str
    backend: str
    library: str
    distribution: str
    runs: str
    ops: tuple[str, ...] = (OP,)

    def kernel(self, op: str) -> str:  # noqa: ARG002 - there is one op
        """What computes an op here, forward: two sources of the same kernel are one truth."""
        return self.runs


@dataclass(frozen=True)
class Origin:
    """What makes an adapter what it is: modules with all that they import of this package, and its row."""

    modules: tuple[str, ...]
    row: str
    apart: tuple[str, ...] = ()


SOURCES: tuple[Source, ...] = (
    Source("grouped-fa3", "fa3", "fa3_fwd", "fa3-fwd", "FlashAttention-3 of the fa3-fwd wheel"),
    Source("grouped-triton", "triton", "triton", "triton", "grouped attention of our own in Triton"),
    # As the source "torch" of the op: another way to hand over slices, but the same kernel.
    Source("grouped-torch", "torch", "torch", "torch", "PyTorch's flash attention"),
)


def adapter(source_name: str, op: str, device: str) -> Callable[..., dict[str, torch.Tensor]]:  # noqa: ARG001 - see below
    """A backend as a function of the definition's inputs; it says itself on which devices it runs, given a plan.

    Raises LookupError for a name that no table holds, and Unavailable("missing") or Unavailable("import-fail"). The
    function raises Unavailable("unsupported") with the backend's own reason.
    """
    source = _source(source_name, op)
    _demand_library(source)

    def gqa_grouped(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_ranges: torch.Tensor,
        k_ranges: torch.Tensor,
        mask_types: torch.Tensor,
        *,
        sm_scale: float,
    ) -> dict[str, torch.Tensor]:
        return _attend(source.backend, (q, k, v), (q_ranges, k_ranges, mask_types), sm_scale)

    return gqa_grouped


def origin(source_name: str, op: str) -> Origin:
    """Where a source comes from, to tell whether it has changed; a backend is loaded by name, so it is named here.

    Found by its path: looking it up by name would import the package, and torch with it.
    """
    source = _source(source_name, op)
    module = _module(source.backend)
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    own = (module,) if path.is_dir() or path.with_suffix(".py").is_file() else ()
    return Origin((__name__, f"{_PACKAGE}.interface", *own), repr(source))


def _attend(
    backend: str, tensors: tuple[torch.Tensor, ...], slices: tuple[torch.Tensor, ...], sm_scale: float
) -> dict[str, torch.Tensor]:
    """One plan and one call; the lse from [heads, rows] and base e to [rows, heads] and base 2."""
    from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func, plan_grouped_attn

    q, k, v = tensors
    plan = plan_grouped_attn(
        *slices,
        total_q=q.shape[0],
        total_k=k.shape[0],
        num_heads_q=q.shape[1],
        num_heads_k=k.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype,
        device=q.device,
    )
    if reason := backends.refusal(backend, plan):
        raise Unavailable("unsupported", reason)
    out, lse = grouped_flash_attn_func(q, k, v, plan, softmax_scale=sm_scale, backend=backend)
    return {"output": out, "lse": (lse * math.log2(math.e)).transpose(0, 1).contiguous()}


def _source(name: str, op: str) -> Source:
    known = {source.name: source for source in SOURCES}
    if name not in known:
        raise LookupError(f"unknown source {name!r}: should be one of {', '.join(known)}")
    if op not in known[name].ops:
        raise LookupError(f"{name} has no op {op!r}: should be one of {', '.join(known[name].ops)}")
    return known[name]


def _demand_library(source: Source) -> None:
    """Installed, new enough, and the backend written; one that cannot be imported is a broken installation."""
    found = version("torch")
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        raise Unavailable("unsupported", f"torch {found} is here, but should be {_told(OLDEST_TORCH)} or later")
    if importlib.util.find_spec(source.library) is None:
        raise Unavailable("missing", f"{source.library} is not installed ({source.distribution})")
    if importlib.util.find_spec(_module(source.backend)) is None:
        raise Unavailable("missing", f"the backend {source.backend} is not installed ({_module(source.backend)})")
    try:
        importlib.import_module(source.library)
    except Exception as error:  # whatever an import raises, the installation is broken: import-fail is red
        told = f"import of {source.library} raises {type(error).__name__}: {error}"
        raise Unavailable("import-fail", told) from error


def _told(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _module(backend: str) -> str:
    """The module of a backend; that of PyTorch's kernels may not be called torch."""
    return f"{_PACKAGE}.backends.{'aten' if backend == 'torch' else backend}"

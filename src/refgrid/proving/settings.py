"""Settings of torch that all of a process shares: who changes one changes every later case, and its own truths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from refgrid.proving.finding import Finding
from refgrid.records.record import Verdict


class _Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _attribute(path: str) -> _Setting:
    owner = torch
    *folders, name = path.split(".")[1:]
    for folder in folders:
        owner = getattr(owner, folder)
    return _Setting(path, partial(getattr, owner, name), partial(setattr, owner, name))


def _float32_products() -> list[_Setting]:
    """What float32 products may be rounded to: by library since torch 2.9, and by the name before, still heeded."""
    since = ("backends", "backends.cuda.matmul", "backends.mkldnn.matmul")
    known = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    before = _Setting(
        "torch.get_float32_matmul_precision()", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    )
    return [*(_attribute(f"torch.{owner}.fp32_precision") for owner in since if known), before]


_SETTINGS = (
    _Setting("torch.get_default_dtype()", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch.is_grad_enabled()", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads),
    _Setting(
        "torch.are_deterministic_algorithms_enabled()",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    _attribute("torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction"),
    _attribute("torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction"),
    _attribute("torch.backends.cudnn.allow_tf32"),
    *_float32_products(),
)


def read_settings() -> list[Any]:
    """All of them as they are now."""
    return [_read(setting) for setting in _SETTINGS]


def _read(setting: _Setting) -> Any:
    """None where it has been told more by newer names than this one can tell."""
    try:
        return setting.read()
    except RuntimeError:
        return None


@contextmanager
def kept_settings() -> Iterator[list[str]]:
    """After the block torch's settings are what they were before; what was changed is then in the list."""
    before, changed = read_settings(), list[str]()
    try:
        yield changed
    finally:
        changed += _put_back(before)


@contextmanager
def demand_own_settings(who: str) -> Iterator[None]:
    """Raise Finding where the block leaves torch with other settings than it found; they are put back in any case."""
    with kept_settings() as changed:
        yield
    if changed:
        reason = f"{who} changed {', '.join(changed)}, which all that the process computes afterwards goes by"
        raise Finding(Verdict.ERROR, reason)


def _put_back(before: Sequence[Any]) -> list[str]:
    """-> what was found to be changed."""
    known = [(setting, value) for setting, value in zip(_SETTINGS, before, strict=True) if value is not None]
    found = [(setting, value, _read(setting)) for setting, value in known]
    for _ in range(2):  # writing one name changes what others tell
        for setting, value in known:
            if _read(setting) != value:
                setting.write(value)
    return [f"{setting.name} from {value} to {now}" for setting, value, now in found if now != value]

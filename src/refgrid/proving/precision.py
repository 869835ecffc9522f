"""The same formula in another precision: torch code run as it stands, with its numbers kept wider or narrower.

`in_float64` is for oracles and referees: nothing that the code rounds is rounded. `in_dtype` is for the three-way
bound: every intermediate is stored in a kernel's dtype, products are summed in float32 as tensor cores do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROUNDED = (torch.float32, torch.float16, torch.bfloat16)
_OF_16_BITS = (torch.float16, torch.bfloat16)
_CHOICES = ("aten::topk", "aten::sort")

Call = Callable[[Mapping[str, Any]], Any]


def in_float64(call: Call, inputs: Mapping[str, Any]) -> Any:
    """`call` on the inputs as float64, in which every cast to a float of 16 or 32 bits leaves a number as it is.

    8-bit floats stay: code looks at their bits. What the code gives has float64 wherever it had a float.
    """
    with _default_float64(), _Wide(_ROUNDED, torch.float64):
        return call(_widened(inputs, _ROUNDED, torch.float64))


def in_float32(call: Call, inputs: Mapping[str, Any]) -> Any:
    """The same in float32 of code that rounds to 16 bits: what is left of its error is that of its float32 sums."""
    with _Wide(_OF_16_BITS, torch.float32):
        return call(_widened(inputs, _OF_16_BITS, torch.float32))


def in_dtype(call: Call, inputs: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """`call` on the inputs, each float32 that it computes rounded to `dtype` before the next step sees it.

    What it chooses (experts, for example) it chooses as without rounding: kernels choose in float32. It is called
    twice and must not write into its inputs.
    """
    if dtype == torch.float32:
        return call(inputs)
    choices = _Choices()
    with choices:
        call(inputs)
    with _Narrow(dtype, iter(choices.made)):
        return call(inputs)


def chosen_by(call: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What `call` gives, and of each choice in it the numbers that were chosen, as it saw them and in its order."""
    choices = _Choices()
    with choices:
        return call(), choices.values


class _Wide(TorchDispatchMode):
    """Casts to, and new tensors of, some floats become those of a wider one."""

    def __init__(self, narrow: Sequence[torch.dtype], wide: torch.dtype) -> None:
        super().__init__()
        self._narrow, self._wide = narrow, wide

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in self._narrow:
            kwargs["dtype"] = self._wide
        return func(*args, **kwargs)


class _Choices(TorchDispatchMode):
    """Remembers what was chosen, call by call: where it stood, and its values."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _chooses(func, args):
            self.made.append(result[1])
            self.values.append(result[0])
        return result


class _Narrow(TorchDispatchMode):
    """Rounds every float32 that is computed, in place where it was written in place; choices are those made before."""

    def __init__(self, dtype: torch.dtype, choices: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self._dtype, self._choices = dtype, choices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _chooses(func, args):
            chosen = next(self._choices)
            return args[0].gather(_dim(func, args, kwargs), chosen), chosen
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            return self._rounded(func._schema.returns[0].alias_info, result)  # noqa: SLF001 - torch has no other name
        return result

    def _rounded(self, alias: Any, result: torch.Tensor) -> torch.Tensor:
        if alias is None:
            return result.to(self._dtype).to(result.dtype)
        if alias.is_write:
            result.copy_(result.to(self._dtype))
        return result  # a view shows what was rounded when it was computed


def _chooses(func: Any, args: Any) -> bool:
    return func.name().partition(".")[0] in _CHOICES and args[0].is_floating_point()


def _dim(func: Any, args: Any, kwargs: Mapping[str, Any] | None) -> int:
    """Along which dimension a choice is made: -1 unless the call says otherwise."""
    names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001
    told = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    return int(told.get("dim", -1))


def _widened(inputs: Mapping[str, Any], narrow: Sequence[torch.dtype], wide: torch.dtype) -> dict[str, Any]:
    floats = {name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dtype in narrow}
    return {name: value.to(wide) if name in floats else value for name, value in inputs.items()}


@contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

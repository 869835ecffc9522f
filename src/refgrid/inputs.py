"""Inputs of a workload: seeded, structured as the op demands, and the same numbers on every machine.

Numbers come from integer draws of the CPU generator and a table of rounded normal quantiles, so that neither vector
instructions nor a maths library change them. Each input has a seed of its own, derived from names alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash

from refgrid import normal, paged
from refgrid.constraint import Constraint
from refgrid.definition import Definition, DefinitionError, InputSpec, Workload

Value: TypeAlias = torch.Tensor | float | int | bool


@dataclass(frozen=True)
class Inputs:
    """Every input by name, in the definition's order, and the xxh3-128 of what was drawn."""

    tensors: dict[str, Value]
    hash: str


def make_inputs(definition: Definition, workload: Workload, seed: int, device: str, root: Path | None) -> Inputs:
    """Draw the inputs of one workload on the CPU generator and place them on `device`.

    Tensors of constant shape (weights) depend on the definition alone and are kept until another definition comes.
    Raises DefinitionError for an open axis, a constraint that does not hold, a file that does not fit, or an input
    that nothing says how to draw.
    """
    for key in [key for key in _kept if key[0] != definition.name]:
        del _kept[key]
    drawing = Drawing(definition, workload, seed, device, root)
    for name in sorted(definition.inputs, key=_turn):
        drawing.demand_constraints(whole=False)
        drawing.values[name] = drawing.make(name)
    drawing.demand_constraints(whole=True)
    return Inputs({name: drawing.values[name] for name in definition.inputs}, drawing.digest.hexdigest())


class Drawing:
    """The inputs of one workload while they are made; builders look at those made before."""

    def __init__(self, definition: Definition, workload: Workload, seed: int, device: str, root: Path | None) -> None:
        self.definition, self.workload, self.seed, self.device, self.root = definition, workload, seed, device, root
        self.axes = definition.axis_values(workload.axes)
        self.values: dict[str, Value] = {}
        self.cpu: dict[str, torch.Tensor] = {}
        self.constraints = [Constraint(text) for text in definition.constraints]
        self.digest = xxhash.xxh3_128(f"{definition.name}/{seed}".encode())

    def make(self, name: str) -> Value:
        """One input, as the workload says: given, read, or drawn."""
        spec = self.workload.inputs[name]
        if spec.type == "scalar":
            return self._scalar(name, spec)
        if spec.type == "safetensors":
            return self.place(name, _read(self, name, spec))
        if self.is_weight(name):
            return _weight(self, name)
        return _builder(name)(self, name)

    def is_weight(self, name: str) -> bool:
        """A tensor of constant shape, unless its builder looks at the workload."""
        return self.definition.is_weight(name) and _builder(name) in (_plain, _gemm_weight)

    def generator(self, name: str) -> torch.Generator:
        """The input's own; a weight has the same numbers at every size."""
        size = "" if self.is_weight(name) else self.workload.uuid
        text = f"{self.definition.name}/{size}/{name}/{self.seed}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(seed)

    def shape(self, name: str) -> tuple[int, ...]:
        """The concrete shape of an input that is a tensor."""
        found = self.definition.shape(name, self.axes)
        if found is None:
            raise self.error(name, "is a scalar that the workload does not give")
        return found

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of an input, if this torch has it."""
        found: torch.dtype | None = getattr(torch, self.definition.inputs[name].dtype, None)
        if found is None:
            raise self.error(name, f"is {self.definition.inputs[name].dtype}, which this torch does not have")
        return found

    def float_dtype(self, name: str) -> torch.dtype:
        """The dtype of an input that can hold normal numbers."""
        dtype = self.dtype(name)
        if not dtype.is_floating_point:
            raise self.error(name, f"is random {dtype}, and nothing says how such an input is made")
        return dtype

    def axis(self, name: str, wanted: str) -> int:
        """The value of an axis that the input `name` is made from."""
        if wanted not in self.axes:
            raise self.error(name, f"is made from the axis {wanted}, which the definition does not have")
        return self.axes[wanted]

    def place(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Hash what was drawn, keep it for later builders, and move it."""
        self.hash(name, drawn)
        self.cpu[name] = drawn
        return drawn.to(self.device)

    def numbers(self, name: str, count: int, scale: float = 1.0, block: int | None = None) -> Iterator[torch.Tensor]:
        """Normal numbers of the input's own seed and dtype, in blocks."""
        return normal.normal_numbers(count, self.float_dtype(name), self.generator(name), scale, block)

    def hash(self, name: str, drawn: torch.Tensor) -> None:
        """Take an input as drawn into the hash: name, shape, dtype, bytes."""
        self.hash_head(name, tuple(drawn.shape))
        self.feed(drawn)

    def feed(self, drawn: torch.Tensor) -> None:
        """Take the bytes of what was drawn into the hash."""
        self.digest.update(drawn.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hash_head(self, name: str, shape: tuple[int, ...]) -> None:
        """Name, shape and dtype alone, for what is fed in parts."""
        self.digest.update(f"/{name}/{shape}/{self.definition.inputs[name].dtype}/".encode())

    def known(self, name: str, needed_by: str) -> torch.Tensor:
        """An input that was made before, on the CPU."""
        if name not in self.cpu:
            raise self.error(needed_by, f"is made from {name}, which the definition does not have")
        return self.cpu[name]

    def error(self, name: str, reason: str) -> DefinitionError:
        """The error of one input at this workload."""
        return DefinitionError(self.definition.file, f"inputs.{name}", f"{reason} (workload {self.workload.uuid})")

    def demand_constraints(self, *, whole: bool) -> None:
        """Check each constraint as soon as all it names is there, so that it speaks before a builder stumbles."""
        known: dict[str, Any] = {**self.values, **self.cpu, **self.axes}
        for constraint in list(self.constraints):
            if whole or all(name in known for name in constraint.names):
                self.constraints.remove(constraint)
                broken = constraint.fault(known)
                if broken:
                    told = f"{broken} (workload {self.workload.uuid})"
                    raise DefinitionError(self.definition.file, "constraints", told)

    def _scalar(self, name: str, spec: InputSpec) -> Value:
        if self.definition.inputs[name].shape is not None or spec.value is None:
            raise self.error(name, f"is given as scalar {spec.value!r}, but should be a tensor or have a value")
        self.digest.update(f"/{name}/{spec.value!r}/".encode())
        return spec.value


def _normal(drawing: Drawing, name: str, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers with standard deviation `scale`, drawn in the input's dtype."""
    shape, start = drawing.shape(name), 0
    whole = torch.empty(math.prod(shape), dtype=drawing.float_dtype(name))
    for part in drawing.numbers(name, len(whole), scale):
        whole[start : start + len(part)] = part
        start += len(part)
    return whole.reshape(shape)


def _plain(drawing: Drawing, name: str) -> Value:
    return drawing.place(name, _normal(drawing, name))


def _gemm_weight(drawing: Drawing, name: str) -> Value:
    """B [N, K] over sqrt(K), as trained weights are; a B of other rank is no gemm's and stays as drawn.

    Outputs are then of order one, so that a kernel which sums in float16 neither overflows nor rounds beyond reason.
    """
    shape = drawing.shape(name)
    return drawing.place(name, _normal(drawing, name, shape[1] ** -0.5 if len(shape) == 2 and shape[1] else 1.0))


# By the field's names for inputs; the first pattern that fits. Everything else is normal.
_BUILDERS: tuple[tuple[str, Callable[[Drawing, str], Value]], ...] = (
    ("qo_indptr", paged.qo_indptr),
    ("kv_indptr", paged.kv_indptr),
    ("kv_indices", paged.kv_indices),
    ("kv_last_page_len", paged.kv_last_page_len),
    ("[kv]_cache", paged.paged_cache),
    ("ckv_cache", paged.paged_cache),
    ("kpe_cache", paged.paged_cache),
    ("B", _gemm_weight),
    ("*", _plain),
)


def _builder(name: str) -> Callable[[Drawing, str], Value]:
    return next(builder for pattern, builder in _BUILDERS if fnmatchcase(name, pattern))


def _turn(name: str) -> int:
    """Builders look at inputs made before them, so the order is the table's."""
    return next(turn for turn, (pattern, _) in enumerate(_BUILDERS) if fnmatchcase(name, pattern))


_kept: dict[tuple[object, ...], tuple[torch.Tensor, bytes]] = {}


def _weight(drawing: Drawing, name: str) -> Value:
    """Drawn and hashed once a definition: a weight can be a gigabyte, and every size of the definition shares it."""
    # shape and dtype are told too: another data set may have another definition of the same name
    key = (drawing.definition.name, name, drawing.seed, drawing.device, drawing.shape(name), drawing.dtype(name))
    if key not in _kept:
        whole, drawing.digest = drawing.digest, xxhash.xxh3_128()
        value = _builder(name)(drawing, name)
        assert isinstance(value, torch.Tensor), f"{name} has a shape, so its builder gives a tensor"
        _kept[key] = (value, drawing.digest.digest())
        drawing.digest = whole
        drawing.cpu.pop(name)  # the constraints that name it look at the placed one
    value, digest = _kept[key]
    drawing.digest.update(digest)
    return value


def _read(drawing: Drawing, name: str, spec: InputSpec) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    if drawing.root is None or spec.path is None:
        raise drawing.error(name, f"is in {spec.path!r} of the data set {drawing.root}, but both should be given")
    path, key = drawing.root / spec.path, spec.tensor_key or name
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found: torch.Tensor = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise drawing.error(name, f"cannot be read from {path}, key {key!r}: {error}") from error
    for what, is_, should in (
        ("shape", list(found.shape), list(drawing.shape(name))),
        ("dtype", found.dtype, drawing.dtype(name)),
    ):
        if is_ != should:
            raise drawing.error(name, f"{what} of {key!r} in {path} is {is_}, but should be {should}")
    return found

"""The inputs of one workload while they are made, and the weights that the workloads of a definition share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import xxhash

from refgrid.dataset.constraint import Constraint
from refgrid.dataset.definition import Definition, DefinitionError, InputSpec, Workload
from refgrid.proving.inputs import normal

if TYPE_CHECKING:
    from refgrid.proving.inputs.rules import Builder, Rule

Value: TypeAlias = torch.Tensor | float | int | bool


@dataclass(frozen=True)
class Inputs:
    """Every input by name, in the definition's order, and the xxh3-128 of what was drawn."""

    tensors: dict[str, Value]
    hash: str


class Drawing:
    """The inputs of one workload while they are made; builders look at those made before."""

    def __init__(
        self,
        definition: Definition,
        workload: Workload,
        seed: int,
        device: str,
        root: Path | None,
        weights_seed: int | None = None,
    ) -> None:
        self.definition, self.workload, self.device, self.root = definition, workload, device, root
        self.seed, self.weights_seed = seed, seed if weights_seed is None else weights_seed
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
        rule = self._rule(name)
        return _weight(self, name, rule.build) if self.is_weight(name) else rule.build(self, name)

    def is_weight(self, name: str) -> bool:
        """A tensor of constant shape, unless its builder looks at the workload."""
        return self.definition.is_weight(name) and not self._rule(name).of_workload

    def _rule(self, name: str) -> Rule:
        from refgrid.proving.inputs.rules import rule_of  # its builders need this module

        return rule_of(self.definition.op_type, name)

    def generator(self, name: str) -> torch.Generator:
        """The input's own; a weight has the same numbers at every size."""
        size, number = ("", self.weights_seed) if self.is_weight(name) else (self.workload.uuid, self.seed)
        text = f"{self.definition.name}/{size}/{name}/{number}"
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


def forget_weights(*, but_of: tuple[str, int] | None = None) -> None:
    """Let go of the weights of every definition and seed, but of one, as they can be gigabytes."""
    for key in [key for key in _kept if key[:2] != but_of]:
        del _kept[key]


_kept: dict[tuple[object, ...], tuple[torch.Tensor, bytes]] = {}


def _weight(drawing: Drawing, name: str, build: Builder) -> Value:
    """Drawn and hashed once a definition: a weight can be a gigabyte, and every size of the definition shares it."""
    # shape and dtype are told too: another data set may have another definition of the same name
    key = (
        *(drawing.definition.name, drawing.weights_seed, name),
        *(drawing.device, drawing.shape(name), drawing.dtype(name)),
    )
    if key not in _kept:
        whole, drawing.digest = drawing.digest, xxhash.xxh3_128()
        value = build(drawing, name)
        assert isinstance(value, torch.Tensor), f"{name} has a shape, so its builder gives a tensor"
        _kept[key] = (value, drawing.digest.digest())
        drawing.digest = whole
        drawing.cpu.pop(name, None)  # the constraints that name it look at the placed one
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

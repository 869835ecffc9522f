"""Inputs of a workload: seeded, structured as the op demands, and the same numbers on every machine.

Numbers come from integer draws of the CPU generator and a table of rounded normal quantiles, so that neither vector
instructions nor a maths library change them. Each input has a seed of its own, derived from names alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import xxhash

from refgrid.definition import Definition, DefinitionError, InputSpec, Workload

Value = torch.Tensor | float | int | bool


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
    drawing = _Drawing(definition, workload, seed, device, root)
    for name in sorted(definition.inputs, key=_turn):
        drawing.values[name] = drawing.make(name)
    drawing.demand_constraints()
    return Inputs({name: drawing.values[name] for name in definition.inputs}, drawing.digest.hexdigest())


class _Drawing:
    """The inputs of one workload while they are made; builders look at those made before."""

    def __init__(
        self, definition: Definition, workload: Workload, seed: int, device: str, root: Path | None
    ) -> None:
        self.definition, self.workload, self.seed, self.device, self.root = definition, workload, seed, device, root
        self.axes = definition.axis_values(workload.axes)
        self.values: dict[str, Value] = {}
        self.cpu: dict[str, torch.Tensor] = {}
        self.digest = xxhash.xxh3_128(f"{definition.name}/{seed}".encode())

    def make(self, name: str) -> Value:
        spec = self.workload.inputs[name]
        if spec.type == "scalar":
            return self._scalar(name, spec)
        if spec.type == "safetensors":
            return self.place(name, _read(self, name, spec))
        if self.definition.is_weight(name):
            return _weight(self, name)
        return _builder(name)(self, name)

    def generator(self, name: str) -> torch.Generator:
        """The input's own; a weight has the same numbers at every size."""
        size = "" if self.definition.is_weight(name) else self.workload.uuid
        text = f"{self.definition.name}/{size}/{name}/{self.seed}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(seed)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self.definition.shape(name, self.axes)
        if found is None:
            raise self.error(name, "is a scalar that the workload does not give")
        return found

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.definition.inputs[name].dtype)
        return found

    def place(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Hash what was drawn, keep it for later builders, and move it."""
        self.hash(name, drawn)
        self.cpu[name] = drawn
        return drawn.to(self.device)

    def hash(self, name: str, drawn: torch.Tensor) -> None:
        self.digest.update(f"/{name}/{tuple(drawn.shape)}/{drawn.dtype}/".encode())
        self.digest.update(_bytes(drawn))

    def error(self, name: str, reason: str) -> DefinitionError:
        return DefinitionError(self.definition.file, f"inputs.{name}", f"{reason} (workload {self.workload.uuid})")

    def demand_constraints(self) -> None:
        """Constraints are Python over axes and tensors; definitions are trusted, their reference is executed too."""
        names: dict[str, Any] = {**self.values, **self.cpu, **self.axes}
        for constraint in self.definition.constraints:
            try:
                holds = bool(eval(constraint, {"__builtins__": {"len": len, "int": int}}, names))
            except Exception as error:
                reason = f"{constraint!r} cannot be evaluated: {type(error).__name__}: {error}"
                raise DefinitionError(self.definition.file, "constraints", reason) from error
            if not holds:
                told = f"workload {self.workload.uuid}, axes {dict(self.workload.axes)}"
                raise DefinitionError(self.definition.file, "constraints", f"{constraint!r} does not hold ({told})")

    def _scalar(self, name: str, spec: InputSpec) -> Value:
        if self.definition.inputs[name].shape is not None or spec.value is None:
            raise self.error(name, f"is given as scalar {spec.value!r}, but should be a tensor or have a value")
        self.digest.update(f"/{name}/{spec.value!r}/".encode())
        return spec.value


def _normal(drawing: _Drawing, name: str, scale: float = 1.0, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Normal numbers with standard deviation `scale`, drawn in the input's dtype."""
    shape, dtype = drawing.shape(name) if shape is None else shape, drawing.dtype(name)
    if not dtype.is_floating_point:
        raise drawing.error(name, f"is random {dtype}, and nothing says how such an input is made")
    count, generator = math.prod(shape), drawing.generator(name)
    if dtype in (torch.float32, torch.float64):  # two draws: 65,536 distinct values would be full of ties
        table = _quantiles(1.0)
        sums = table.index_select(0, _draws(count, generator)) + table.index_select(0, _draws(count, generator))
        return (sums * (scale * math.sqrt(0.5))).to(dtype).reshape(shape)
    return _quantiles(scale).to(dtype).index_select(0, _draws(count, generator)).reshape(shape)


def _draws(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` integers in [0, 65536), four from each 64-bit draw."""
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32) + 32768


@cache
def _quantiles(scale: float) -> torch.Tensor:
    """65,536 normal quantiles, rounded so that no maths library differs in them."""
    normal = NormalDist()
    values = [round(normal.inv_cdf((i + 0.5) / 65536), 6) for i in range(65536)]
    return torch.tensor(values, dtype=torch.float64).mul(scale).float()


def _plain(drawing: _Drawing, name: str) -> Value:
    return drawing.place(name, _normal(drawing, name))


def _gemm_weight(drawing: _Drawing, name: str) -> Value:
    """B [N, K] over sqrt(K), as trained weights are: outputs of order one keep float16 sums far from its range."""
    return drawing.place(name, _normal(drawing, name, drawing.shape(name)[-1] ** -0.5))


def _qo_indptr(drawing: _Drawing, name: str) -> Value:
    parts = _composition(drawing.shape("q")[0], drawing.shape(name)[0] - 1, drawing.generator(name))
    return drawing.place(name, _indptr(parts))


def _kv_indptr(drawing: _Drawing, name: str) -> Value:
    """Pages of each sequence; where the sizes allow it, a sequence holds at least the tokens it is queried for."""
    total, count = drawing.axes["num_kv_indices"], drawing.shape(name)[0] - 1
    least = torch.zeros(count, dtype=torch.int64)
    if "qo_indptr" in drawing.cpu:
        page_size = drawing.axes["page_size"]
        wanted = -(-drawing.cpu["qo_indptr"].diff().long() // page_size)
        least = wanted if int(wanted.sum()) <= total else least
    parts = least + _composition(total - int(least.sum()), count, drawing.generator(name))
    return drawing.place(name, _indptr(parts))


def _kv_indices(drawing: _Drawing, name: str) -> Value:
    """Pages in an order of their own; shared between sequences only when there are fewer pages than indices."""
    wanted, pages, generator = drawing.shape(name)[0], drawing.axes["num_pages"], drawing.generator(name)
    if wanted and not pages:
        raise drawing.error(name, f"has {wanted} entries, but num_pages is 0: there is no page to name")
    if wanted <= pages:
        order = torch.randperm(pages, generator=generator)[:wanted]
    else:
        order = torch.randint(pages, (wanted,), generator=generator)
    return drawing.place(name, order.to(torch.int32))


def _kv_last_page_len(drawing: _Drawing, name: str) -> Value:
    """1 to page_size tokens, and 0 for a sequence without pages, as FlashInfer counts them."""
    (count,), page_size = drawing.shape(name), drawing.axes["page_size"]
    lengths = torch.randint(1, page_size + 1, (count,), generator=drawing.generator(name))
    return drawing.place(name, (lengths * (drawing.cpu["kv_indptr"].diff() > 0)).to(torch.int32))


def _paged_cache(drawing: _Drawing, name: str) -> Value:
    """Numbers in the slots that a sequence uses and NaN in all others, so that reading a wrong slot shows."""
    shape, slots = drawing.shape(name), used_slots(drawing)
    drawn = _normal(drawing, name, shape=(len(slots), *shape[2:]))
    drawing.hash(name, drawn)
    cache = torch.full(shape, torch.nan, dtype=drawing.dtype(name), device=drawing.device)
    cache.view(-1, *shape[2:]).index_copy_(0, slots.to(drawing.device), drawn.to(drawing.device))
    return cache


def used_slots(drawing: _Drawing) -> torch.Tensor:
    """Slots (page * page_size + place) that some sequence uses, ascending."""
    page_size, pages = drawing.axes["page_size"], drawing.cpu["kv_indices"].long()
    filled = torch.full_like(pages, page_size)
    if "kv_last_page_len" in drawing.cpu:
        ends, lengths = drawing.cpu["kv_indptr"][1:].long(), drawing.cpu["kv_last_page_len"].long()
        filled[ends[lengths > 0] - 1] = lengths[lengths > 0]
    used = torch.zeros(drawing.axes["num_pages"], dtype=torch.int64)
    used.scatter_reduce_(0, pages, filled, "amax")  # a shared page holds what any of its sequences needs
    return (torch.arange(page_size) < used[:, None]).reshape(-1).nonzero().squeeze(1)


# By the field's names for inputs; the first pattern that fits. Everything else is normal.
_BUILDERS: tuple[tuple[str, Callable[[_Drawing, str], Value]], ...] = (
    ("qo_indptr", _qo_indptr),
    ("kv_indptr", _kv_indptr),
    ("kv_indices", _kv_indices),
    ("kv_last_page_len", _kv_last_page_len),
    ("[kv]_cache", _paged_cache),
    ("B", _gemm_weight),
    ("*", _plain),
)


def _builder(name: str) -> Callable[[_Drawing, str], Value]:
    return next(builder for pattern, builder in _BUILDERS if fnmatchcase(name, pattern))


def _turn(name: str) -> int:
    """Builders look at inputs made before them, so the order is the table's."""
    return next(turn for turn, (pattern, _) in enumerate(_BUILDERS) if fnmatchcase(name, pattern))


_kept: dict[tuple[str, str, int, str], tuple[torch.Tensor, bytes]] = {}


def _weight(drawing: _Drawing, name: str) -> Value:
    """Drawn and hashed once a definition: a weight can be a gigabyte, and every size of the definition shares it."""
    key = (drawing.definition.name, name, drawing.seed, drawing.device)
    if key not in _kept:
        for other in [other for other in _kept if other[0] != key[0]]:
            del _kept[other]
        whole, drawing.digest = drawing.digest, xxhash.xxh3_128()
        value = _builder(name)(drawing, name)
        assert isinstance(value, torch.Tensor), f"{name} has a shape, so its builder gives a tensor"
        _kept[key] = (value, drawing.digest.digest())
        drawing.digest = whole
        drawing.cpu.pop(name)
    value, digest = _kept[key]
    drawing.digest.update(digest)
    return value


def _composition(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers of sum `total`, each such row of cuts equally likely; zeros are among them."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    cuts = torch.randint(total + 1, (count - 1,), generator=generator).sort().values
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([total])])
    return ends.diff()


def _indptr(parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), parts.cumsum(0)]).to(torch.int32)


def _read(drawing: _Drawing, name: str, spec: InputSpec) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    path = (drawing.root or Path()) / (spec.path or "")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found: torch.Tensor = file.get_tensor(spec.tensor_key or name)
    except (OSError, SafetensorError) as error:
        raise drawing.error(name, f"cannot be read from {path}, key {spec.tensor_key!r}: {error}") from error
    for what, is_, should in (
        ("shape", tuple(found.shape), drawing.shape(name)),
        ("dtype", found.dtype, drawing.dtype(name)),
    ):
        if is_ != should:
            raise drawing.error(name, f"{what} in {path} is {is_}, but should be {should}")
    return found


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

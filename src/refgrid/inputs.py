"""Inputs of a workload: seeded, structured as the op demands, and the same numbers on every machine.

Numbers come from integer draws of the CPU generator and a table of rounded normal quantiles, so that neither vector
instructions nor a maths library change them. Each input has a seed of its own, derived from names alone.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeAlias

import torch
import xxhash

from refgrid.definition import Definition, DefinitionError, InputSpec, Workload

Value: TypeAlias = torch.Tensor | float | int | bool

# What a constraint may call.
_FUNCTIONS: dict[str, Any] = {f.__name__: f for f in (abs, all, any, int, len, max, min, sum)}
_BLOCK = 2**22  # numbers drawn at once, a multiple of 4: 16 MiB of indices, however large the tensor


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
    drawing = _Drawing(definition, workload, seed, device, root)
    for name in sorted(definition.inputs, key=_turn):
        drawing.demand_constraints(whole=False)
        drawing.values[name] = drawing.make(name)
    drawing.demand_constraints(whole=True)
    return Inputs({name: drawing.values[name] for name in definition.inputs}, drawing.digest.hexdigest())


class _Drawing:
    """The inputs of one workload while they are made; builders look at those made before."""

    def __init__(self, definition: Definition, workload: Workload, seed: int, device: str, root: Path | None) -> None:
        self.definition, self.workload, self.seed, self.device, self.root = definition, workload, seed, device, root
        self.axes = definition.axis_values(workload.axes)
        self.values: dict[str, Value] = {}
        self.cpu: dict[str, torch.Tensor] = {}
        self.constraints = list(definition.constraints)
        self.digest = xxhash.xxh3_128(f"{definition.name}/{seed}".encode())

    def make(self, name: str) -> Value:
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
        found = self.definition.shape(name, self.axes)
        if found is None:
            raise self.error(name, "is a scalar that the workload does not give")
        return found

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype | None = getattr(torch, self.definition.inputs[name].dtype, None)
        if found is None:
            raise self.error(name, f"is {self.definition.inputs[name].dtype}, which this torch does not have")
        return found

    def float_dtype(self, name: str) -> torch.dtype:
        dtype = self.dtype(name)
        if not dtype.is_floating_point:
            raise self.error(name, f"is random {dtype}, and nothing says how such an input is made")
        return dtype

    def axis(self, name: str, wanted: str) -> int:
        if wanted not in self.axes:
            raise self.error(name, f"is made from the axis {wanted}, which the definition does not have")
        return self.axes[wanted]

    def place(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Hash what was drawn, keep it for later builders, and move it."""
        self.hash(name, drawn)
        self.cpu[name] = drawn
        return drawn.to(self.device)

    def hash(self, name: str, drawn: torch.Tensor) -> None:
        self.hash_head(name, tuple(drawn.shape))
        self.digest.update(_bytes(drawn))

    def hash_head(self, name: str, shape: tuple[int, ...]) -> None:
        self.digest.update(f"/{name}/{shape}/{self.definition.inputs[name].dtype}/".encode())

    def known(self, name: str, needed_by: str) -> torch.Tensor:
        """An input that was made before, on the CPU."""
        if name not in self.cpu:
            raise self.error(needed_by, f"is made from {name}, which the definition does not have")
        return self.cpu[name]

    def error(self, name: str, reason: str) -> DefinitionError:
        return DefinitionError(self.definition.file, f"inputs.{name}", f"{reason} (workload {self.workload.uuid})")

    def demand_constraints(self, *, whole: bool) -> None:
        """Check each constraint as soon as all it names is there, so that it speaks before a builder stumbles.

        Constraints are Python over axes and tensors; definitions are trusted, their reference is executed too.
        """
        known: dict[str, Any] = {**self.values, **self.cpu, **self.axes}
        for constraint in list(self.constraints):
            used = [node.id for node in ast.walk(ast.parse(constraint, mode="eval")) if isinstance(node, ast.Name)]
            if whole or all(name in known or name in _FUNCTIONS for name in used):
                self.constraints.remove(constraint)
                self._demand(constraint, {name: known[name] for name in dict.fromkeys(used) if name in known})

    def _demand(self, constraint: str, names: dict[str, Any]) -> None:
        try:
            # names are globals: a comprehension in a constraint would not see locals
            holds = bool(eval(constraint, {"__builtins__": _FUNCTIONS, **names}))  # noqa: S307  trusted, see above
        except Exception as error:
            reason = f"{constraint!r} cannot be evaluated: {type(error).__name__}: {error}"
            raise DefinitionError(self.definition.file, "constraints", reason) from error
        if not holds:
            told = ", ".join(f"{name} = {_told(value)}" for name, value in names.items())
            reason = f"{constraint!r} does not hold: {told} (workload {self.workload.uuid})"
            raise DefinitionError(self.definition.file, "constraints", reason)

    def _scalar(self, name: str, spec: InputSpec) -> Value:
        if self.definition.inputs[name].shape is not None or spec.value is None:
            raise self.error(name, f"is given as scalar {spec.value!r}, but should be a tensor or have a value")
        self.digest.update(f"/{name}/{spec.value!r}/".encode())
        return spec.value


def _normal(drawing: _Drawing, name: str, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers with standard deviation `scale`, drawn in the input's dtype."""
    shape, start = drawing.shape(name), 0
    whole = torch.empty(math.prod(shape), dtype=drawing.float_dtype(name))
    for part in _numbers(drawing, name, len(whole), scale):
        whole[start : start + len(part)] = part
        start += len(part)
    return whole.reshape(shape)


def _numbers(
    drawing: _Drawing, name: str, count: int, scale: float = 1.0, block: int = _BLOCK
) -> Iterator[torch.Tensor]:
    """The same `count` normal numbers whatever the block, a multiple of 4."""
    dtype, generator = drawing.float_dtype(name), drawing.generator(name)
    wide = dtype in (torch.float32, torch.float64)
    table = _quantiles() * scale if wide else (_quantiles() * scale).to(dtype)
    for start in range(0, count, block):
        size = min(block, count - start)
        if wide:  # two draws a number: 65,536 distinct values would be full of ties
            sums = table.index_select(0, _draws(2 * size, generator)).view(size, 2).sum(1)
            yield (sums * math.sqrt(0.5)).to(dtype)
        else:
            yield table.index_select(0, _draws(size, generator))


def _draws(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` integers in [0, 65536), four from each 64-bit draw."""
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


@cache
def _quantiles() -> torch.Tensor:
    """65,536 normal quantiles in float64, rounded so that no maths library differs in them."""
    normal = NormalDist()
    return torch.tensor([round(normal.inv_cdf((i + 0.5) / 65536), 6) for i in range(65536)], dtype=torch.float64)


def _plain(drawing: _Drawing, name: str) -> Value:
    return drawing.place(name, _normal(drawing, name))


def _gemm_weight(drawing: _Drawing, name: str) -> Value:
    """B [N, K] over sqrt(K), as trained weights are; a B of other rank is no gemm's and stays as drawn.

    Outputs are then of order one, so that a kernel which sums in float16 neither overflows nor rounds beyond reason.
    """
    shape = drawing.shape(name)
    return drawing.place(name, _normal(drawing, name, shape[1] ** -0.5 if len(shape) == 2 and shape[1] else 1.0))


def _qo_indptr(drawing: _Drawing, name: str) -> Value:
    total = drawing.shape("q")[0] if "q" in drawing.definition.inputs else drawing.axis(name, "total_q")
    return drawing.place(name, _indptr(_composition(total, drawing.shape(name)[0] - 1, drawing.generator(name))))


def _kv_indptr(drawing: _Drawing, name: str) -> Value:
    """Pages of each sequence, tokens where there are no pages; where the sizes allow it, enough for its queries."""
    paged, count = "num_kv_indices" in drawing.axes, drawing.shape(name)[0] - 1
    total = drawing.axis(name, "num_kv_indices" if paged else "total_kv")
    least = torch.zeros(max(count, 0), dtype=torch.int64)
    if "qo_indptr" in drawing.cpu:
        page_size = drawing.axis(name, "page_size") if paged else 1
        wanted = -(-drawing.cpu["qo_indptr"].diff().long() // page_size)
        least = wanted if int(wanted.sum()) <= total else least
    parts = least + _composition(total - int(least.sum()), count, drawing.generator(name))
    return drawing.place(name, _indptr(parts))


def _kv_indices(drawing: _Drawing, name: str) -> Value:
    """Pages in an order of their own; shared between sequences only when there are fewer pages than indices."""
    wanted, pages, generator = drawing.shape(name)[0], drawing.axis(name, "num_pages"), drawing.generator(name)
    if wanted and not pages:
        raise drawing.error(name, f"has {wanted} entries, but num_pages is 0: there is no page to name")
    if wanted <= pages:
        order = torch.randperm(pages, generator=generator)[:wanted]
    else:
        order = torch.randint(pages, (wanted,), generator=generator)
    return drawing.place(name, order.to(torch.int32))


def _kv_last_page_len(drawing: _Drawing, name: str) -> Value:
    """1 to page_size tokens, as many as the queries need if all fit, and 0 for a sequence without pages.

    0 because FlashInfer's get_seq_lens adds it to (pages - 1, at least 0) * page_size.
    """
    page_size, pages = drawing.axis(name, "page_size"), drawing.known("kv_indptr", name).diff().long()
    least = torch.ones_like(pages)
    if "qo_indptr" in drawing.cpu:
        needed = drawing.cpu["qo_indptr"].diff() - (pages - 1) * page_size
        least = needed.clamp(min=1) if bool((needed <= page_size).all()) else least
    choices = page_size + 1 - least  # differ, so a remainder: of so large a number it is as good as uniform
    lengths = least + torch.randint(2**40, (len(pages),), generator=drawing.generator(name)) % choices
    return drawing.place(name, (lengths * (pages > 0)).to(torch.int32))


def _paged_cache(drawing: _Drawing, name: str) -> Value:
    """Numbers in the slots that a sequence uses and NaN in all others, so that reading a wrong slot shows.

    Made on the device, a block of slots at a time: a cache can be larger than the machine's memory.
    """
    shape, slots, start = drawing.shape(name), used_slots(drawing, name).to(drawing.device), 0
    cache = torch.full(shape, torch.nan, dtype=drawing.float_dtype(name), device=drawing.device)
    rows, width = _movable(cache).view(-1, *shape[2:]), max(1, math.prod(shape[2:]))
    drawing.hash_head(name, shape)
    for part in _numbers(drawing, name, len(slots) * width, block=max(4, _BLOCK // width // 4 * 4) * width):
        drawing.digest.update(_bytes(part))
        block = _movable(part).view(-1, *shape[2:]).to(drawing.device)
        rows.index_copy_(0, slots[start : start + len(block)], block)
        start += len(block)
    return cache


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of an 8-bit float, for which not every operation that only moves numbers is there."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def used_slots(drawing: _Drawing, name: str) -> torch.Tensor:
    """Slots (page * page_size + place) that some sequence uses, ascending."""
    page_size, count = drawing.axis(name, "page_size"), drawing.axis(name, "num_pages")
    pages, indptr = drawing.known("kv_indices", name).long(), drawing.known("kv_indptr", name).long()
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < count:
        raise drawing.error("kv_indices", f"names a page outside [0, {count})")
    filled = torch.full_like(pages, page_size)
    if "kv_last_page_len" in drawing.cpu:
        lengths = drawing.cpu["kv_last_page_len"].long()
        filled[indptr[1:][lengths > 0] - 1] = lengths[lengths > 0]
    used = torch.zeros(count, dtype=torch.int64)
    used.scatter_reduce_(0, pages, filled, "amax")  # a shared page holds what any of its sequences needs
    return (torch.arange(page_size) < used[:, None]).reshape(-1).nonzero().squeeze(1)


# By the field's names for inputs; the first pattern that fits. Everything else is normal.
_BUILDERS: tuple[tuple[str, Callable[[_Drawing, str], Value]], ...] = (
    ("qo_indptr", _qo_indptr),
    ("kv_indptr", _kv_indptr),
    ("kv_indices", _kv_indices),
    ("kv_last_page_len", _kv_last_page_len),
    ("[kv]_cache", _paged_cache),
    ("ckv_cache", _paged_cache),
    ("kpe_cache", _paged_cache),
    ("B", _gemm_weight),
    ("*", _plain),
)


def _builder(name: str) -> Callable[[_Drawing, str], Value]:
    return next(builder for pattern, builder in _BUILDERS if fnmatchcase(name, pattern))


def _turn(name: str) -> int:
    """Builders look at inputs made before them, so the order is the table's."""
    return next(turn for turn, (pattern, _) in enumerate(_BUILDERS) if fnmatchcase(name, pattern))


_kept: dict[tuple[object, ...], tuple[torch.Tensor, bytes]] = {}


def _weight(drawing: _Drawing, name: str) -> Value:
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


def _composition(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers of sum `total`, each such row of cuts equally likely; zeros are among them."""
    if count <= 0:
        return torch.zeros(0, dtype=torch.int64)
    cuts = torch.randint(total + 1, (count - 1,), generator=generator).sort().values
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([total])])
    return ends.diff()


def _indptr(parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), parts.cumsum(0)]).to(torch.int32)


def _read(drawing: _Drawing, name: str, spec: InputSpec) -> torch.Tensor:
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


def _told(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return str(value.tolist()) if value.numel() <= 16 else f"{value.dtype} {list(value.shape)}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data

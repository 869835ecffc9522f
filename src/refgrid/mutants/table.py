"""The table of mutants, `mutants/<op_type>.toml`: read, checked, and refused with the reason. Imports no torch.

The head of each file names the places where its faults are planted, each a definition and one of its workloads:

    [places.decode]
    definition = "gqa_paged_decode_h20_kv4_d128_ps64"
    workload = "edge_b5_n17_p32"       # the small one at which the tests plant; the command takes all of a size
    source = "torch"                   # what must turn the case red
    twin = true                        # where the weights are large: in a copy with small constants

A mutant changes a text, `sound` into `broken`, or wraps the function: `before` are statements over the inputs by name,
run before the call, and `after` over inputs and outputs. It is planted into the definition's reference, or, with
`adapter`, into that module of the place's source.

    [[mutants]]
    name = "scale off by 1 %"
    at = "decode"
    sound = "sm_scale=sm_scale"
    broken = "sm_scale=sm_scale * 1.01"
    told = "lse is off"                # a regular expression that the reason holds at the place's workload
    verdict = "mismatch"               # which the case ends in there; mismatch if it is not said
    race = true                        # two of its writes race, so that it may be nondeterministic as well
    also = { prefill = "lse is off" }  # other workloads of the definition at which the tests plant it, and what is told
    check = "numerics"                 # or determinism, or agreement of an adapter with those of other sources
    device = "cpu"                     # or cuda, for adapters of libraries that need a GPU
    equivalent = ""                    # the argument why nothing can be seen of it; it must then be seen nowhere
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from refgrid.records.record import Verdict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Text = Annotated[str, Field(min_length=1)]


class MutantError(ValueError):
    """A mutant that cannot be planted, or says nothing: file, mutant and reason."""


class Place(BaseModel):
    """Where faults are planted; the module's head says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    definition: Text
    workload: Text
    source: Text = "oracle"
    twin: bool = False


class Mutant(BaseModel):
    """One fault; the module's head says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text
    at: Text
    sound: str = ""
    broken: str = ""
    before: str = ""
    after: str = ""
    adapter: str = ""
    told: str = ""
    also: dict[str, str] = {}
    verdict: Verdict = Verdict.MISMATCH
    check: Literal["numerics", "determinism", "agreement"] = "numerics"
    device: Literal["cpu", "cuda"] = "cpu"
    equivalent: str = ""
    race: bool = Field(False, exclude=True)  # names the red only
    file: str = Field("", exclude=True)
    places: dict[str, Place] = Field({}, exclude=True)

    @field_validator("told")
    @classmethod
    def _is_an_expression(cls, told: str) -> str:
        try:
            re.compile(told)
        except re.error as error:
            raise ValueError(f"{told!r} is no regular expression: {error}") from error
        return told

    @model_validator(mode="after")
    def _does_one_thing(self) -> Mutant:
        if bool(self.sound) == bool(self.before or self.after):
            raise ValueError("says either sound and broken, or before and after")
        if self.sound == self.broken and self.sound:
            raise ValueError(f"changes nothing: sound and broken are both {self.sound!r}")
        if bool(self.told) == bool(self.equivalent):
            raise ValueError("says either what the reason tells of it, or why it is equivalent")
        if self.verdict.colour != "red":
            raise ValueError(f"verdict = {self.verdict.value}, but should be a red one")
        return self

    @property
    def where(self) -> Place:
        """The place that it names; only of a mutant that was read from a table."""
        return self.places[self.at]

    @property
    def guarded(self) -> tuple[tuple[Place, str], ...]:
        """Every place at which the tests plant it, and what the reason must tell there."""
        return ((self.where, self.told), *((self.places[at], told) for at, told in self.also.items()))

    @property
    def op_type(self) -> str:
        """The name of the file that it stands in."""
        return Path(self.file).stem

    @property
    def id(self) -> str:
        """Unique among all mutants."""
        return f"{self.op_type}: {self.name}"

    @property
    def digest(self) -> str:
        """Changes with the fault and its place, so that evidence of another fault is told apart."""
        told = f"{self.model_dump_json()}{self.where.model_dump_json()}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def error(self, reason: str) -> MutantError:
        """The error of this mutant, with its file and name."""
        return MutantError(f"{self.file}: mutant {self.name!r}: {reason}")


class _File(BaseModel):
    """One file of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    places: dict[str, Place]
    mutants: tuple[Mutant, ...]


def load_mutants(folder: Path) -> tuple[Mutant, ...]:
    """Every mutant of the table, by file and in their order.

    Raises MutantError for a folder without files, a broken file, a name that stands twice in a file, a place that the
    file does not have, and the same fault under two names.
    """
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise MutantError(f"{folder}: holds no table of mutants, <op_type>.toml")
    found = tuple(mutant for file in files for mutant in _read(file))
    _demand_unique(found)
    return found


def _read(file: Path) -> Iterator[Mutant]:
    shown = f"{file.parent.name}/{file.name}"
    try:
        table = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise MutantError(f"{shown}: {error}") from error
    except ValidationError as error:
        raise MutantError(f"{shown}: {_first(error, file)}") from None
    for mutant in table.mutants:
        for at in (mutant.at, *mutant.also):
            if at not in table.places:
                known = ", ".join(table.places)
                raise MutantError(f"{shown}: mutant {mutant.name!r}: at = {at!r}, but should be one of {known}")
        yield mutant.model_copy(update={"file": shown, "places": table.places})


def _first(error: ValidationError, file: Path) -> str:
    """The first complaint with the name of the mutant that it is about."""
    complaint: Mapping[str, Any] = error.errors()[0]
    where = ".".join(map(str, complaint["loc"]))
    if len(complaint["loc"]) > 1 and complaint["loc"][0] == "mutants":
        number = int(complaint["loc"][1])
        name = tomllib.loads(file.read_text(encoding="utf-8"))["mutants"][number].get("name", f"number {number + 1}")
        field = ".".join(map(str, complaint["loc"][2:]))
        where = f"mutant {name!r}{f': {field}' if field else ''}"
    return f"{where}: {complaint['msg']}"


def _demand_unique(mutants: tuple[Mutant, ...]) -> None:
    names: set[str] = set()
    faults: dict[tuple[object, ...], str] = {}
    for mutant in mutants:
        if mutant.id in names:
            raise mutant.error("stands there twice")
        names.add(mutant.id)
        side = (mutant.where.definition, mutant.adapter and mutant.where.source, mutant.adapter)
        fault = (*side, mutant.sound, mutant.broken, mutant.before, mutant.after)
        if fault in faults:
            raise mutant.error(f"is the same fault as {faults[fault]!r}")
        faults[fault] = mutant.name

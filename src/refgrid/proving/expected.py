"""Failures that are known, with reason and link, from `ci/expected_failures.toml`; each entry must still be true.

[[expected]]
cases = ["gqa_paged_decode_*-edge_*-flashinfer"]   # globs over the names of cases: their ids, but of every seed
environments = ["cu130*"]                          # globs over names of environments
device = "cuda"                                    # optional: only where cases run on this device, cpu or cuda
verdict = "mismatch"
reason = "lse of an empty sequence is finite"
link = "https://..."
outlier = "flashinfer"                             # optional: the source whose fault it is; a mismatch where float64
                                                   # names another one, or another one too, is not the one known
other_seeds = ["gqa_paged_decode_*-flashinfer"]    # optional, needs outlier: which cases it hits depends on the inputs;
                                                   # with those of a seed other than 0 each may end so, or match
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from refgrid.records.record import Verdict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ExpectedError(ValueError):
    """The file of expected failures cannot be used, or an entry of it is no longer true."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: Annotated[tuple[str, ...], Field(min_length=1)]
    environments: Annotated[tuple[str, ...], Field(min_length=1)]
    verdict: Verdict
    reason: Annotated[str, Field(min_length=10)]
    link: Annotated[str, Field(pattern=r"^https://")]
    device: Literal["", "cpu", "cuda"] = ""
    outlier: str = ""
    other_seeds: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_whom_it_excuses(self) -> _Entry:
        if self.other_seeds and not self.outlier:
            raise ValueError("other_seeds without outlier: any source's mismatch would be taken for the known one")
        if self.outlier and self.verdict is not Verdict.MISMATCH:
            raise ValueError(f"outlier beside verdict {self.verdict.value!r}: float64 names one of a mismatch only")
        return self

    def is_about(self, environment: str, device: str) -> bool:
        return _fits(environment, self.environments) and self.device in ("", device)

    def covers(self, name: str, seed: int) -> bool:
        return _fits(name, self.other_seeds if self.other_seeds and seed else self.cases)

    def may_match(self, seed: int) -> bool:
        return bool(self.other_seeds and seed)

    def excuses(self, outliers: Collection[str]) -> bool:
        return not self.outlier or set(outliers) == {self.outlier}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    expected: tuple[_Entry, ...] = ()


@dataclass(frozen=True)
class ExpectedFailures:
    """The entries of one environment."""

    file: Path
    entries: tuple[_Entry, ...] = ()

    def check(self, names: Iterable[str]) -> None:
        """Raise ExpectedError for an entry that covers none of all the cases there are, or blames no source of them."""
        known = list(names)
        for pattern in (pattern for entry in self.entries for pattern in (*entry.cases, *entry.other_seeds)):
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ExpectedError(f"{self.file}: {pattern!r} matches no case; remove or correct it")
        for entry in self.entries:
            if entry.outlier and not any(n.endswith(f"-{entry.outlier}") and entry.covers(n, 0) for n in known):
                told = f"outlier {entry.outlier!r} is the source of none of the cases {list(entry.cases)}"
                raise ExpectedError(f"{self.file}: {told}; list one that is held against it, or correct it")

    def revise(
        self, name: str, seed: int, verdict: Verdict, reason: str, outliers: Collection[str] = ()
    ) -> tuple[Verdict, str]:
        """An expected failure becomes `expected`; one that has become a match becomes an `error`.

        `outliers` are the sides that float64 says are off: one that no entry is about is a failure of its own.
        """
        others = []
        for entry in (entry for entry in self.entries if entry.covers(name, seed)):
            if verdict is entry.verdict and entry.excuses(outliers):
                return Verdict.EXPECTED, f"{entry.reason} ({entry.link}): {reason}"
            if verdict is entry.verdict:
                others.append(entry.outlier)
            if verdict is Verdict.MATCH and not entry.may_match(seed):
                told = f"{entry.verdict.value} was expected ({entry.reason}) but the case matches"
                return Verdict.ERROR, f"{told}: narrow or remove its entry in {self.file.name}"
        if others:
            off = ", ".join(sorted(outliers)) or "none that float64 names"
            reason = f"{reason}; {self.file.name} excuses it where {' or '.join(others)} alone is off, but off is {off}"
        return verdict, reason


def load_expected(file: Path, environment: str, device: str) -> ExpectedFailures:
    """The entries for one environment on one device, cpu or cuda; none where there is no file.

    Raises ExpectedError naming the file, the field and the reason.
    """
    if not file.exists():
        return ExpectedFailures(file)
    try:
        parsed = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ExpectedError(f"{file}: is no TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ExpectedError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return ExpectedFailures(file, tuple(e for e in parsed.expected if e.is_about(environment, device)))

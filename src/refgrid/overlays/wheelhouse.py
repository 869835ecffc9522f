"""A wheelhouse: exactly the wheels that a machine without an index lacks, in parts that can be carried one by one.

Every wheel is packed for itself: its files uncompressed, then xz with the filter for machine code, since a wheel's own
compression is worse by half. `refgrid.overlays.overlay`, which travels along, puts them together and lays them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.utils import canonicalize_name, parse_wheel_filename

from refgrid.overlays import overlay

_TIME = (1980, 1, 1, 0, 0, 0)  # no date of today in a file that is the same tomorrow
_TAR_HEAD, _TAR_END = 1024, 10240  # of each member at most, and of the archive

Say = Callable[[str], None]


class WheelhouseError(RuntimeError):
    """A wheelhouse cannot be made: what is missing or wrong, one line each."""


@dataclass(frozen=True)
class Cargo:
    """What one environment needs: its wheels as files, and what overlay must find on the machine.

    `demands` are all of its pins, name==version, whether a wheel is carried for them or the machine has them.
    """

    name: str
    python: str
    machine: tuple[str, ...]
    omit: tuple[str, ...]
    wheels: tuple[Path, ...]
    demands: tuple[str, ...]


@dataclass
class Packed:
    """One wheel as it travels; `sha256` is that of the wheel after `without` was left out of it."""

    file: str
    name: str
    version: str
    sha256: str
    original_sha256: str
    packages: list[str]
    without: list[str]
    size: int
    data: bytes = field(repr=False)
    pieces: list[dict[str, str]] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        told = {name: getattr(self, name) for name in ("file", "name", "version", "sha256", "original_sha256")}
        return {**told, "size": self.size, "packages": self.packages, "without": self.without, "pieces": self.pieces}


def build(cargos: Sequence[Cargo], output: Path, part_size: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Write the parts, the manifest and overlay.py into a folder; returns the manifest.

    Raises WheelhouseError, before anything is written, for torch, a part size that holds nothing, or a pattern of
    files to omit that matches none.
    """
    if part_size <= _TAR_HEAD + _TAR_END:
        raise WheelhouseError(f"parts of {part_size} bytes hold nothing; give more than {_TAR_HEAD + _TAR_END}")
    wheels = _omissions(cargos)
    _refuse_torch(cargos)
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # each takes up to 0.7 GiB, see xz(1), preset 9
        packed = []
        for number, each in enumerate(workers.map(_pack, wheels, wheels.values()), 1):
            packed.append(each)
            say(f"packed {number} of {len(wheels)}: {each.file}, {_mb(each.size)} as {_mb(len(each.data))}")
    parts = _parts(packed, part_size)
    manifest = {"format": overlay.FORMAT, "environments": dict(map(_described, cargos))}
    return _write({**manifest, "wheels": [each.described() for each in packed]}, parts, output, say)


def _described(cargo: Cargo) -> tuple[str, dict[str, Any]]:
    wheels = [wheel.name for wheel in cargo.wheels]
    asked = {"python": cargo.python, "machine": list(cargo.machine), "demands": list(cargo.demands)}
    return cargo.name, {**asked, "wheels": wheels}


def _refuse_torch(cargos: Sequence[Cargo]) -> None:
    for cargo in cargos:
        kept = {"torch", *(canonicalize_name(pin.partition("==")[0]) for pin in cargo.machine)}
        for wheel in cargo.wheels:
            if (name := parse_wheel_filename(wheel.name)[0]) in kept:
                raise WheelhouseError(f"{wheel.name}: {cargo.name} finds {name} on the machine, which keeps its own")


def _omissions(cargos: Sequence[Cargo]) -> dict[Path, tuple[str, ...]]:
    """Which files of each wheel stay behind; one wheel is packed once, for all environments alike."""
    found: dict[str, tuple[Path, tuple[str, ...]]] = {}
    for cargo in cargos:
        used: set[str] = set()
        for wheel in cargo.wheels:
            names = zipfile.ZipFile(wheel).namelist()
            matches = {name: {glob for glob in cargo.omit if fnmatch(name, glob)} for name in names}
            used |= set().union(*matches.values())
            left_out = tuple(sorted(name for name, globs in matches.items() if globs))
            if found.setdefault(wheel.name, (wheel, left_out))[1] != left_out:
                raise WheelhouseError(f"{wheel.name}: its environments omit different files; pack them apart")
        if unused := sorted(set(cargo.omit) - used):
            raise WheelhouseError(f"{cargo.name}: omit: {', '.join(unused)} matches no file of any wheel")
    return dict(sorted(found.values()))


def _pack(wheel: Path, without: Sequence[str]) -> Packed:
    name, version, _, tags = parse_wheel_filename(wheel.name)
    stored, packages = _stored(wheel, set(without))
    machine_code = any(tag.platform.endswith("x86_64") for tag in tags)
    data = lzma.compress(stored, filters=_filters(len(stored), machine_code=machine_code))
    digest, original = hashlib.sha256(stored).hexdigest(), hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Packed(
        wheel.name, name, str(version), digest, original, sorted(packages), list(without), wheel.stat().st_size, data
    )


def _stored(wheel: Path, without: set[str]) -> tuple[bytes, set[str]]:
    """The same wheel uncompressed, always the same bytes, and the names that can be imported from it."""
    memory, packages = BytesIO(), set()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(memory, "w") as target:
        for member in sorted(source.infolist(), key=lambda member: member.filename):
            if member.is_dir() or member.filename in without:
                continue
            copy = zipfile.ZipInfo(member.filename, _TIME)
            copy.external_attr = member.external_attr
            target.writestr(copy, source.read(member))
            packages.add(member.filename.partition("/")[0].removesuffix(".py"))
    return memory.getvalue(), {name for name in packages if name.isidentifier()}


def _filters(size: int, *, machine_code: bool) -> list[dict[str, int]]:
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _dictionary(size)}
    return [{"id": lzma.FILTER_X86}, lzma2] if machine_code else [lzma2]


def _dictionary(size: int) -> int:
    """As large as the data, which an eager allocation for 46 small wheels would forget."""
    return min(max(1 << (size - 1).bit_length(), 1 << 16), 1 << 26) if size else 1 << 16


def _parts(packed: Sequence[Packed], size: int) -> list[dict[str, bytes]]:
    """Members by part: the largest first, each where there is room; only what is larger than a part is split."""
    room = size - _TAR_END - _TAR_HEAD
    parts: list[dict[str, bytes]] = []
    free: list[int] = []
    for wheel, number, data in sorted(_pieces(packed, room), key=lambda piece: -len(piece[2])):
        at = next((index for index, left in enumerate(free) if len(data) + _TAR_HEAD <= left), len(parts))
        if at == len(parts):
            parts.append({})
            free.append(size - _TAR_END)
        member = f"{packed.index(wheel):03d}-{wheel.name}.xz.{number:03d}"  # a tar's names end at 100 letters
        parts[at][member] = data
        free[at] -= len(data) + _TAR_HEAD
        wheel.pieces.append({"part": _part_name(at), "member": member})
    for wheel in packed:
        wheel.pieces.sort(key=lambda piece: piece["member"])
    return parts


def _pieces(packed: Sequence[Packed], room: int) -> Iterator[tuple[Packed, int, bytes]]:
    for wheel in packed:
        for number, start in enumerate(range(0, len(wheel.data), room)):
            yield wheel, number, wheel.data[start : start + room]


def _part_name(index: int) -> str:
    return f"part-{index + 1:02d}.tar"


def _write(manifest: dict[str, Any], parts: Sequence[Mapping[str, bytes]], output: Path, say: Say) -> dict[str, Any]:
    """The folder whole or not at all; one that is no wheelhouse is not replaced."""
    if output.exists() and any(output.iterdir()) and not (output / overlay.MANIFEST).exists():
        raise WheelhouseError(f"{output} is not empty and is no wheelhouse")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        made = Path(scratch, "wheelhouse")
        made.mkdir()
        files = [_tar(made / _part_name(index), members) for index, members in enumerate(parts)]
        manifest["parts"] = [
            {"file": file.name, "size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in files
        ]
        (made / overlay.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(overlay.__file__, made / "overlay.py")
        if output.exists():
            output.rename(Path(scratch, "before"))
        made.rename(output)
    for part in manifest["parts"]:
        say(f"written: {output / part['file']}, {_mb(part['size'])}")
    return manifest


def _tar(file: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return file


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

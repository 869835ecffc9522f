"""Wheels of a few files, made on the spot, the cargo that they are, and an index that serves them."""

from __future__ import annotations

import random
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refgrid.environments.declared import EnvironmentSpec
from refgrid.overlays.wheelhouse import Cargo, WheelhouseError

PYTHON = ".".join(map(str, sys.version_info[:2]))
NOISE = random.Random(0).randbytes(200_000)  # what no compressor makes smaller
ENTRY = {"kernels-1.0.dist-info/entry_points.txt": b"[refgrid.sources]\nkernels = kernels\n"}
INSTRUMENT = "tool==1.0 \\\n    --hash=sha256:ee\ndsl==1.0 \\\n    --hash=sha256:bb\n"
SPEC = EnvironmentSpec.model_validate(
    {
        "name": "mine",
        "kind": "overlay",
        "python": PYTHON,
        "pins": ("kernels==1.0",),
        "machine": ("torch==2.13.0",),
        "origin": "nobody",
        "exclude-newer": "2026-07-15",
    }
)


def make_wheel(folder: Path, name: str, files: Mapping[str, bytes], version: str = "1.0") -> Path:
    """A wheel as any index serves it."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    told = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": b"Wheel-Version: 1.0\n"}
    record = "".join(f"{file},,\n" for file in (*told, f"{info}/RECORD"))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in {**told, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(file, data)
    return wheel


def cargo(folder: Path, name: str = "mine", *, omit: tuple[str, ...] = (), **changed: Any) -> Cargo:
    told = {"python": PYTHON, "machine": ("torch==2.13.0",), "wheels": tuple(sorted(folder.glob("*.whl")))}
    wheels = {**told, **changed}["wheels"]
    demands = tuple(f"{wheel.name.partition('-')[0]}==1.0" for wheel in wheels)
    return Cargo(**{"name": name, "omit": omit, "demands": demands, **told, **changed})


class Uv:
    """Stands in for uv: an index that serves the wheels of a folder."""

    def __init__(self, index: Path) -> None:
        self.index, self.fetched = index, list[str]()

    def __call__(self, _: Path, *arguments: str) -> None:
        option = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if arguments[0] == "build":
            make_wheel(Path(option["--out-dir"]), "refgrid", {})
        elif arguments[:2] == ("pip", "compile"):
            Path(option["--output-file"]).write_text(INSTRUMENT)
        else:
            name = Path(option["--requirement"]).read_text().partition("==")[0]
            self.fetched.append(name)
            found = list(self.index.glob(f"{name}-*.whl"))
            if not found:
                raise WheelhouseError(f"uv tool run failed: WARNING\nERROR: No matching distribution found for {name}")
            (Path(option["--dest"]) / found[0].name).write_bytes(found[0].read_bytes())

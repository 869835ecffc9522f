"""Lay the wheels of a wheelhouse over the interpreter that runs this, without touching what is installed there.

The standard library alone is enough: a wheelhouse carries this very file, for a machine that has a Python and no index.

    python3 overlay.py have > have.json                             what is here, for `nox -s wheelhouse -- --have`
    python3 overlay.py check                                        is the wheelhouse whole, and for this machine?
    python3 overlay.py lay --environment NAME --target SITE         lay its wheels into the folder SITE
    python3 overlay.py run --target SITE -- python3 -m pytest ...   run a command with it; or: . SITE/env.sh

Nothing is laid before every part and every wheel has been held against the manifest, and all that the environment's
lock demands is carried or installed here. The machine's torch stays.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MANIFEST, VARIABLES, WHOLE = "manifest.json", "environment.json", "laid-from.txt"
FORMAT = 2  # of the manifest: 1 did not say what an environment demands
_PTH = """
import json, site, sys
before = set(sys.path)
site.addsitedir(sys.argv[1])
print(json.dumps([folder for folder in sys.path if folder not in before]))
"""
# Caches of what is compiled, one set an environment, by the variables that libraries read at their import; they
# outlive the folder of the wheels. `noxfile.py` and the instrument read this table, too. FlashInfer's cubins lie below
# its base: FLASHINFER_CUBIN_DIR is not set, as it would come before an installed flashinfer-cubin.
CACHES = {
    "CUDA_CACHE_PATH": "cuda",
    "CUTE_DSL_CACHE_DIR": "cute-dsl",
    "DG_JIT_CACHE_DIR": "deep-gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "SGLANG_DG_CACHE_DIR": "deep-gemm",  # with which SGLang overwrites DeepGEMM's own
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "TRITON_CACHE_DIR": "triton",
    "TVM_FFI_CACHE_DIR": "tvm-ffi",  # SGLang's own kernels, found by their sources: torch and CUDA are not in the name
}
_BLOCK = 1 << 24
# The checkout's own packages, for those who change them on the machine.
MEMBERS = ("src", "references/src", "groundtruth/src", "solutions/src")


class OverlayError(RuntimeError):
    """A wheelhouse cannot be laid over this interpreter: what is wrong, one line each."""


class Wheelhouse:
    """A folder with a manifest and its parts; raises OverlayError when it has no manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            _demand_format(folder, self.manifest)
            self.wheels: dict[str, Any] = {wheel["file"]: wheel for wheel in self.manifest["wheels"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OverlayError(f"{folder / MANIFEST}: is no manifest of a wheelhouse: {error!r}") from error

    def environment(self, name: str | None) -> tuple[str, Any]:
        """One environment that was packed; the only one if none is named."""
        packed = self.manifest["environments"]
        if name is None and len(packed) == 1:
            (name,) = packed
        if name is None or name not in packed:
            raise OverlayError(f"{name!r} is no environment of {self.folder}; legal values: {', '.join(packed)}")
        return name, packed[name]

    def faults(self, wheels: Sequence[str]) -> Iterator[str]:
        """Parts that are missing or damaged, and which of the wheels are lost with them."""
        for part in self.manifest["parts"]:
            path = self.folder / part["file"]
            lost = [wheel for wheel in wheels if any(p["part"] == path.name for p in self.wheels[wheel]["pieces"])]
            if not lost:
                continue
            if not path.exists():
                yield f"{path} is missing, and with it {', '.join(lost)}"
            elif (found := _sha256(path)) != part["sha256"]:
                yield f"{path} is damaged: sha256 {found} should be {part['sha256']}; it holds {', '.join(lost)}"

    def unpack(self, wheel: str, folder: Path) -> Path:
        """Put the pieces of one wheel together; raises OverlayError when it is not what was packed."""
        described = self.wheels[wheel]
        path, decompressor = folder / wheel, lzma.LZMADecompressor()
        try:
            with path.open("wb") as file:
                for piece in described["pieces"]:
                    file.writelines(_decompressed(decompressor, self._piece(piece)))
        except (OSError, KeyError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise OverlayError(f"{wheel}: cannot be put together: {error!r}") from error
        if (found := _sha256(path)) != described["sha256"]:
            raise OverlayError(f"{wheel}: sha256 {found} should be {described['sha256']}")
        return path

    def _piece(self, piece: dict[str, str]) -> bytes:
        with tarfile.open(self.folder / piece["part"]) as part:
            member = part.extractfile(piece["member"])
            return member.read() if member else b""


def _demand_format(folder: Path, manifest: Any) -> None:
    """Before anything else is read, which another format may have elsewhere."""
    if (found := manifest["format"]) != FORMAT:
        anew = f"nox -s wheelhouse -- {' '.join(manifest.get('environments', ())) or 'NAME'}"
        told = f"format {found} should be {FORMAT}; collect the wheels anew, where there is an index: {anew}"
        raise OverlayError(f"{folder / MANIFEST}: {told}")


def check(wheelhouse: Wheelhouse, name: str | None) -> str:
    """The environment's name if all it needs is whole and fits this machine; raises OverlayError with every fault."""
    name, packed = wheelhouse.environment(name)
    unknown = [f"{wheel}: is not in the manifest" for wheel in packed["wheels"] if wheel not in wheelhouse.wheels]
    machine = [*_other_machine(packed), *([] if unknown else _missing(wheelhouse, packed))]
    faults = [*machine, *(unknown or [*_torch(wheelhouse, packed), *wheelhouse.faults(packed["wheels"])])]
    if faults:
        raise OverlayError("\n".join(faults))
    return name


def lay(wheelhouse: Wheelhouse, name: str | None, target: Path) -> Path:
    """Lay the wheels of an environment into `target`, whole or not at all; returns the file of its variables.

    Where the same was laid before, to its end, nothing is done.
    """
    name, packed = wheelhouse.environment(name)
    if faults := [*_other_machine(packed), *_own_folder(target)]:
        raise OverlayError("\n".join(faults))
    state, last = _state(wheelhouse, name, target), target / WHOLE
    if not last.is_file() or last.read_text(encoding="utf-8") != state:
        check(wheelhouse, name)
        _lay_wheels(wheelhouse, name, target)
        _compile_modules(target)
        last.write_text(state, encoding="utf-8")
    return target / VARIABLES


def _state(wheelhouse: Wheelhouse, name: str, target: Path) -> str:
    """What a folder that was laid follows from: the wheels, this program, the interpreter, and where it all lies."""
    files = (wheelhouse.folder / MANIFEST, Path(__file__))
    return "\n".join([name, str(target.resolve()), sys.executable, sys.version, *map(_sha256, files)])


def _lay_wheels(wheelhouse: Wheelhouse, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        site = Path(scratch, "site")
        wheels = [wheelhouse.unpack(wheel, Path(scratch)) for wheel in wheelhouse.environment(name)[1]["wheels"]]
        for wheel in wheels:
            _lay_wheel(wheel, site)
            wheel.unlink()
        _write_variables(name, site, target)
        if target.exists():
            target.rename(Path(scratch, "before"))
        site.rename(target)


def _compile_modules(target: Path) -> None:
    """Python's bytecode, of the wheels and of the machine's own packages, into the overlay's cache.

    Else every worker of the first run compiles the same thousands of modules, all at once. A file that is no Python of
    this version, such as a template, is left to whoever imports it.
    """
    folders = dict.fromkeys([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    python = [sys.executable, "-m", "compileall", "-q", "-q", "-j", "0", *folders]
    subprocess.run(python, env={**os.environ, **variables(target)}, check=False)


def variables(target: Path, checkout: Path | None = None) -> dict[str, str]:
    """What the environment of a process needs besides its own; raises OverlayError for a folder never laid."""
    try:
        told = json.loads((target / VARIABLES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OverlayError(f"{target}: nothing was laid there: {error}") from error
    own = [str(checkout.resolve() / member) for member in MEMBERS] if checkout else []
    path = [*own, *told["path"], *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**told["variables"], "PYTHONPATH": os.pathsep.join(path)}


def have() -> list[dict[str, str]]:
    """What is installed here, as `pip list --format json` says it; the first of two counts."""
    found: dict[str, dict[str, str]] = {}
    for each in importlib.metadata.distributions():
        if name := each.metadata["Name"]:
            found.setdefault(_canonical(name), {"name": name, "version": each.version})
    return sorted(found.values(), key=lambda each: each["name"].lower())


def _decompressed(decompressor: lzma.LZMADecompressor, piece: bytes) -> Iterator[bytes]:
    """In blocks: a piece may hold many times its size."""
    yield decompressor.decompress(piece, _BLOCK)
    while not (decompressor.eof or decompressor.needs_input):
        yield decompressor.decompress(b"", _BLOCK)


def _torch(wheelhouse: Wheelhouse, packed: Any) -> Iterator[str]:
    """The machine's torch, and what the environment says to find there, must never be replaced."""
    kept = {"torch", *(_canonical(pin.partition("==")[0]) for pin in packed["machine"])}
    for wheel in packed["wheels"]:
        described = wheelhouse.wheels[wheel]
        if _canonical(described["name"]) in kept or "torch" in described["packages"]:
            yield f"{wheel}: would replace the machine's own {described['name']}, which an overlay never does"


def _other_machine(packed: Any) -> Iterator[str]:
    python = ".".join(map(str, sys.version_info[:2]))
    if python != packed["python"]:
        yield f"{sys.executable} is Python {python}, but the wheels are for {packed['python']}"
    found = {_canonical(each["name"]): each["version"] for each in have()}
    for pin in packed["machine"]:
        name, _, asked = pin.partition("==")
        there = found.get(_canonical(name), "none")
        if _release(there) != _release(asked):
            yield f"{name} {there} is installed here, but the wheels are for {asked}"


def _missing(wheelhouse: Wheelhouse, packed: Any) -> Iterator[str]:
    """What the lock demands and nobody brings: a wheel that was left out, or wheels for a machine that has more."""
    here = {_canonical(each["name"]): each["version"] for each in have()}
    wheels = (wheelhouse.wheels[wheel] for wheel in packed["wheels"])
    there = {**here, **{_canonical(wheel["name"]): wheel["version"] for wheel in wheels}}
    for pin in packed["demands"]:
        name, _, asked = pin.partition("==")
        if _release(there.get(_canonical(name), "none")) != _release(asked):
            installed = here.get(_canonical(name), "no release of it")
            yield f"{pin} is demanded, but no wheel of it is carried, and installed here is {installed}"


def _release(version: str) -> list[str]:
    """For comparison: some metadata say 2024.07.04 or 1.0.rc1 for 2024.7.4 and 1.0rc1; a build label is left out."""
    return [part.lstrip("0") or "0" for part in re.findall(r"\d+|[a-z]+", version.lower().partition("+")[0])]


def _own_folder(target: Path) -> Iterator[str]:
    """Neither a folder of the interpreter nor one that somebody else filled."""
    theirs, place = map(sysconfig.get_path, ("purelib", "platlib", "stdlib")), target.resolve()
    for folder in {Path(each).resolve() for each in theirs} & {place, *place.parents}:
        yield f"{target} lies in {folder}, which belongs to the interpreter"
    if target.exists() and any(target.iterdir()) and not (target / VARIABLES).exists():
        yield f"{target} is not empty and was not laid by this program"


def _lay_wheel(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            place = _place(member.filename, site)
            if place is None or member.is_dir():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, place.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            if place.parent == site / "bin" or (member.external_attr >> 16) & stat.S_IXUSR:
                place.chmod(0o755)


def _place(member: str, site: Path) -> Path | None:
    """Where a member of a wheel goes; headers are for nobody who compiles nothing against them."""
    parts = Path(member).parts
    if Path(member).is_absolute() or ".." in parts:
        raise OverlayError(f"{member}: leaves the folder of its wheel")
    if not parts[0].endswith(".data"):
        return site.joinpath(*parts)
    below = {"purelib": "", "platlib": "", "data": "", "scripts": "bin"}.get(parts[1])
    return None if below is None else site.joinpath(below, *parts[2:])


def _write_variables(name: str, site: Path, target: Path) -> None:
    target = target.resolve()
    caches = target.parent / "kernels" / name
    path = [str(target), *(str(target / folder) for folder in _pth_folders(site))]
    told = {
        "REFGRID_ENVIRONMENT": name,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a warning of the machine's own plugins would be an error here
        "FLASHINFER_DISABLE_VERSION_CHECK": "1",  # the audit holds versions against each other
        "PYTHONPYCACHEPREFIX": str(caches / "bytecode"),  # else the interpreter writes beside its own modules
        **{variable: str(caches / folder) for variable, folder in CACHES.items()},
    }
    (site / VARIABLES).write_text(json.dumps({"environment": name, "path": path, "variables": told}, indent=1))
    lines = [f"export {variable}={shlex.quote(value)}" for variable, value in told.items()]
    lines.append(f"export PYTHONPATH={shlex.quote(os.pathsep.join(path))}${{PYTHONPATH:+:$PYTHONPATH}}")
    (site / "env.sh").write_text("\n".join(lines) + "\n")


def _pth_folders(site: Path) -> Iterator[Path]:
    """Folders that .pth files add, some by a program: Python reads these files in its own folders only."""
    python = [sys.executable, "-c", _PTH, str(site)]
    done = subprocess.run(python, env={**os.environ, "PYTHONPATH": str(site)}, stdout=subprocess.PIPE, check=False)
    for folder in map(Path, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ()):
        if site in folder.parents and folder.is_dir():
            yield folder.relative_to(site)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(dest="command", required=True)
    command.add_parser("have")
    for verb in ("check", "lay"):
        one = command.add_parser(verb)
        one.add_argument("--wheelhouse", type=Path, default=Path(__file__).parent, help="default: this file's folder")
        one.add_argument("--environment", help="which of those that were packed")
        if verb == "lay":
            one.add_argument("--target", type=Path, required=True, help="folder of the wheels, replaced as a whole")
    run = command.add_parser("run")
    run.add_argument("--target", type=Path, required=True, help="folder that was laid")
    run.add_argument("--checkout", type=Path, help="take this workspace's own packages from here")
    run.add_argument("words", nargs="+", metavar="-- COMMAND")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 3 when something is wrong with the wheelhouse or this machine."""
    asked = _arguments(argv)
    try:
        if asked.command == "have":
            print(json.dumps(have(), indent=1))  # noqa: T201
        elif asked.command == "run":
            own = variables(asked.target, asked.checkout)
            return subprocess.run(asked.words, env={**os.environ, **own}, check=False).returncode
        else:
            wheelhouse = Wheelhouse(asked.wheelhouse)
            if asked.command == "lay":
                name, _ = wheelhouse.environment(asked.environment)
                print(f"{name}: {lay(wheelhouse, name, asked.target)}")  # noqa: T201
            else:
                print(f"{check(wheelhouse, asked.environment)}: whole, and for this machine")  # noqa: T201
    except OverlayError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)  # noqa: T201
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""What this project can do for you: `nox --list`. Arguments after `--` go through to pytest."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True  # a session that cannot run has not succeeded
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
LOCKS = ROOT / "ci" / "locks"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
ENVIRONMENTS = {entry["name"]: entry for entry in nox.project.load_toml(ROOT / "ci/environments.toml")["environment"]}
VENVS = {name: entry for name, entry in ENVIRONMENTS.items() if entry["kind"] == "venv"}
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
MEMBERS = ["--editable=.", "--editable=references", "--editable=groundtruth"]

# In a test file: torch itself, a module of the instrument that imports it, or a pytest of its own.
NEEDS_TORCH = r"import torch|importorskip|refgrid\.(proof|compare|inputs|normal)|\"-m\", \"pytest\""
# A worker that a kernel kills takes only its own case along; the other modes of xdist lose results or hang.
CRASH_SAFE = ["--dist=load", "--max-worker-restart=10000"]

# PyPI's build of torch for Linux brings the CUDA libraries along; what that costs is said before it happens.
PYPI_TORCH_SIZE = "about 2.7 GB"
# An index of the machine would otherwise be written into the locks.
NO_INDEX_SETTINGS = dict.fromkeys(
    ("UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_EXCLUDE_NEWER"), None
)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types and workflows; needs no torch."""
    _sync(session, "--group=lint", "--group=test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("check-jsonschema", "--builtin-schema=vendor.github-workflows", *_workflows())
    session.run("zizmor", "--offline", "--quiet", ".github/workflows")


@nox.session(python=VENVS["cpu"]["python"])
def tests(session: nox.Session) -> None:
    """Test the instrument, the references and the adapters; needs no GPU."""
    _install(session, "cpu")
    session.run("pytest", "--ignore=tests/references", "-n2", *session.posargs)


@nox.session(python=PYTHONS, default=False)
def instrument(session: nox.Session) -> None:
    """Test the part of the instrument that starts without torch, on every supported Python."""
    _sync(session, "--group=test")
    session.run("pytest", *_torch_free_tests(session), *session.posargs)


@nox.session(python=VENVS["cpu"]["python"], default=False)
def matrix(session: nox.Session) -> None:
    """Prove every reference on this CPU and print the matrix; fails if a cell is red or nothing was proven."""
    _install(session, "cpu")
    # 1 = cases failed: the matrix says which, and its exit status is the one that counts.
    _prove(session, "cpu", "--progress", "--no-header", "--no-summary", "-q", success_codes=[0, 1])
    session.run("refgrid", "matrix")


@nox.session(default=False)
def render(session: nox.Session) -> None:
    """Write definitions/ from the references and their table of sizes; needs no torch."""
    _sync(session)
    session.install("--no-deps", "--editable=references")
    session.run("refgrid", "render", *session.posargs)


@nox.session(default=False)
def plan(session: nox.Session) -> None:
    """Count the cases that a run owes; needs no torch."""
    _sync(session)
    session.install("--no-deps", "--editable=groundtruth")
    session.run("refgrid", "plan", *session.posargs)


@nox.session(python=VENVS["cpu"]["python"], default=False)
def bench(session: nox.Session) -> None:
    """Time the instrument itself: collection, and its share of a case."""
    _install(session, "cpu")
    session.run("python", "-m", "refgrid.bench", *session.posargs)


@nox.session(name="bench-references", python=VENVS["cpu"]["python"], default=False)
def bench_references(session: nox.Session) -> None:
    """Time each reference against a plain loop over sequences, tokens or heads."""
    _install(session, "cpu")
    session.run("python", "tests/bench_references.py", *session.posargs)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write uv.lock and ci/locks/ anew; name environments after `--` to write only their locks."""
    for name in session.posargs or ENVIRONMENTS:
        _compile(session, name)
    if not session.posargs:
        session.run_install("uv", "lock", env=NO_INDEX_SETTINGS)


def _tests_session(name: str) -> None:
    """Declare `tests-<name>`."""

    def prove(session: nox.Session) -> None:
        _install(session, name)
        _prove(session, name)

    prove.__doc__ = f"Prove every reference in environment {name}: {', '.join(VENVS[name]['pins'])}."
    nox.session(name=f"tests-{name}", python=VENVS[name]["python"], default=False)(prove)


for _name in VENVS:
    _tests_session(_name)


def _prove(session: nox.Session, name: str, *options: str, **run: Any) -> None:
    """The product in one environment; what is asked for on the command line comes last and wins."""
    device = "cpu" if "cuda" not in VENVS[name] else _device(session)
    sizes = ["-n2", "--test-sizes=small", "--memory=2GiB"] if device == "cpu" else ["-n1"]
    files = [] if any(".py" in argument for argument in session.posargs) else ["tests/references"]
    given = [*files, f"--device={device}", f"--environment={name}", *CRASH_SAFE, *sizes, *options, *session.posargs]
    session.run("pytest", *given, env=_caches(session, name), **run)


def _device(session: nox.Session) -> str:
    """cuda if an NVIDIA driver lists a GPU, else cpu; says which and why."""
    tool = shutil.which("nvidia-smi")
    listed = session.run(tool, "--list-gpus", silent=True, success_codes=range(256), external=True) if tool else None
    gpus = [line for line in str(listed or "").splitlines() if line.startswith("GPU ")]
    session.log(f"nvidia-smi lists {len(gpus)} GPU(s)" if tool else "there is no nvidia-smi, so no GPU")
    return "cuda" if gpus else "cpu"


def _caches(session: nox.Session, name: str) -> dict[str, str]:
    """Compiled kernels of one version set must never be loaded by another; read before the interpreter starts."""
    folder = Path(session.cache_dir) / "kernels" / name
    caches = {
        "CUDA_CACHE_PATH": "cuda",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TORCH_EXTENSIONS_DIR": "extensions",
        "TRITON_CACHE_DIR": "triton",
    }
    return {"REFGRID_ENVIRONMENT": name, **{variable: str(folder / part) for variable, part in caches.items()}}


def _sync(session: nox.Session, *groups: str) -> None:
    """The instrument as uv.lock pins it, without torch."""
    where = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "UV_PYTHON": session.virtualenv.location}
    session.run_install("uv", "sync", "--locked", "--no-default-groups", *groups, env=where)


def _install(session: nox.Session, name: str) -> None:
    """One environment exactly as its lock pins it, and the members of this workspace."""
    session.run_install("uv", "pip", "sync", "--require-hashes", f"ci/locks/{name}.txt")
    if "cuda" not in ENVIRONMENTS[name]:
        _install_cpu_torch(session, next(pin for pin in ENVIRONMENTS[name]["pins"] if pin.startswith("torch==")))
    session.install("--no-deps", *MEMBERS)


def _install_cpu_torch(session: nox.Session, pin: str) -> None:
    """A CPU build of torch, from the nearest place that has it."""
    for place, options in _torch_places():
        session.log(f"{pin}: trying {place}")
        try:
            session.install(pin, *options)
            session.run("python", "-c", "import torch; print('torch', torch.__version__)")
        except nox.command.CommandFailed:
            session.warn(f"{pin}: {place} cannot serve this machine")
        else:
            return
    session.error(f"no place serves {pin} for Python {platform.python_version()} on {platform.platform()}")


def _torch_places() -> Iterator[tuple[str, list[str]]]:
    """Places in the order of their cost. pip reads PIP_FIND_LINKS, uv does not: the same wheels are meant."""
    told = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
    if local := told.replace(",", " ").split():
        yield (
            f"the machine's own wheels in {told}",
            ["--no-deps", "--no-index", *(f"--find-links={at}" for at in local)],
        )
    yield "PyTorch's CPU index", ["--no-deps", "--torch-backend=cpu"]
    yield f"PyPI's build with its CUDA libraries ({PYPI_TORCH_SIZE} on Linux)", []


def _compile(session: nox.Session, name: str) -> None:
    """Pin one environment with hashes: its libraries, and what the instrument needs."""
    entry, output = ENVIRONMENTS[name], LOCKS / f"{name}.txt"
    folder = Path(session.create_tmp())
    pins, without = folder / "pins.in", folder / "without.txt"
    pins.write_text("".join(f"{pin}\n" for pin in entry["pins"]))
    without.write_text("".join(f"{requirement}\n" for requirement in entry.get("without", [])))
    output.unlink(missing_ok=True)  # uv keeps the pins that it finds there
    needs = ["pyproject.toml", "--group=test", f"--excludes={without}"] if entry["kind"] == "venv" else ["--no-deps"]
    torch = [] if "cuda" in entry else ["--no-emit-package=torch"]
    told = f"nox -s lock -- {name} (as of {entry['exclude-newer']}, Python {entry['python']})"
    session.run_install(
        *("uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", f"--output-file={output}"),
        *(f"--exclude-newer={entry['exclude-newer']}", f"--custom-compile-command={told}"),
        *(str(pins), *needs, *torch, *_machines(entry)),
        env=NO_INDEX_SETTINGS,
    )


def _machines(entry: dict[str, Any]) -> list[str]:
    """Whom a lock serves: CUDA one Python on Linux (glibc 2.34, as sglang asks), the CPU wherever its Pythons run."""
    lowest = entry["python"].removeprefix(">=").partition(",")[0]
    return [
        f"--python-version={lowest}",
        "--python-platform=x86_64-manylinux_2_34" if "cuda" in entry else "--universal",
    ]


def _torch_free_tests(session: nox.Session) -> list[str]:
    """The test files that neither import torch nor run cases; the others are named, not dropped in silence."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    needy = {file for file in files if re.search(NEEDS_TORCH, file.read_text())}
    session.log(f"without torch, so not here: {', '.join(sorted(file.name for file in needy))}")
    return [str(file.relative_to(ROOT)) for file in files if file not in needy]


def _workflows() -> list[str]:
    return [str(file.relative_to(ROOT)) for file in sorted((ROOT / ".github/workflows").glob("*.yml"))]


def _show_every_pyenv_version() -> None:
    """pyenv's shims answer only for selected versions, so select all that are installed, after those that are."""
    if "PYENV_ROOT" in os.environ:
        versions = Path(os.environ["PYENV_ROOT"], "versions")
        installed = [folder.name for version in PYTHONS for folder in sorted(versions.glob(f"{version}.*"))]
        selected = os.environ.get("PYENV_VERSION", platform.python_version()).split(":")
        os.environ["PYENV_VERSION"] = ":".join(dict.fromkeys([*selected, *installed]))


_show_every_pyenv_version()
# A session's environment is its own: with compiled modules in it, a worker starts in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if __name__ == "__main__":
    nox.main()

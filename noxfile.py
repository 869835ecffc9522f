#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""What this project can do for you: `nox --list`. Arguments after `--` go through to pytest."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True  # a session that cannot run has not succeeded
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
LOCKS = ROOT / "ci" / "locks"
OVERLAY = "src/refgrid/overlays/overlay.py"  # needs no more than Python; the table of caches is in it
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SOURCES = ["--editable=groundtruth", "--editable=solutions"]  # who brings sources: the plan names them all
MEMBERS = ["--editable=.", "--editable=references", *SOURCES]


def _declared() -> dict[str, dict[str, Any]]:
    """Every environment by name. Sessions are made of these fields; what else is wrong with one, `nox -s lint` says."""
    table, found = ROOT / "ci" / "environments.toml", dict[str, dict[str, Any]]()
    try:
        entries = nox.project.load_toml(table)["environment"]
    except (ValueError, KeyError) as error:
        raise SystemExit(f"{table}: cannot be read: {error}") from error
    for number, entry in enumerate(entries, 1):
        for field in ("name", "kind", "python", "origin", *({"cuda"} & set(entry))):
            if not isinstance(entry.get(field), str):
                should = f"{field} should be text, and is {entry.get(field, 'missing')!r}"
                raise SystemExit(f"{table}: environment {entry.get('name', f'number {number}')}: {should}")
        found[entry["name"]] = entry
    return found


ENVIRONMENTS = _declared()
VENVS = {name: entry for name, entry in ENVIRONMENTS.items() if entry["kind"] != "overlay"}

# A worker that a kernel kills takes only its own case along; the other modes of xdist lose results or hang.
CRASH_SAFE = ["--dist=load", "--max-worker-restart=10000"]
# Libraries bring pytest plugins along, older than pytest itself: their warnings would be errors of every run.
OWN_PLUGINS = ["-p", "xdist.plugin", "-p", "refgrid.plugin"]

# Seconds after Ctrl-C in which every case is accounted for; by itself nox kills after half a second.
ACCOUNTING_TIME = 60

# In place of what goes to pytest: compile ahead, and run no case. Before it: run the cases over fresh seeds;
# or, instead of cases, the tests that need a GPU.
WARM, SOAK, BENCH, GPU = "--warm", "--soak", "--bench", "--gpu"
GPU_TESTS = "tests-gpu"  # named as an environment's session, and is none's

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
    session.run("refgrid", "check-environments")
    workflows = [str(file.relative_to(ROOT)) for file in sorted(ROOT.glob(".github/workflows/*.yml"))]
    session.run("check-jsonschema", "--builtin-schema=vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", "--persona=auditor", ".github/workflows")


@nox.session(python=VENVS["cpu"]["python"])
def tests(session: nox.Session) -> None:
    """Test the instrument, the references and the adapters; needs no GPU."""
    _install(session, "cpu")
    session.run("pytest", "--ignore=tests/references", "-n2", *session.posargs)


@nox.session(python=PYTHONS, default=False)
def instrument(session: nox.Session) -> None:
    """Test the part of the instrument that starts without torch, on every supported Python."""
    _sync_with_sources(session, "--group=test")
    session.run("pytest", "--ignore=tests/references", "--ignore=tests/solutions", *session.posargs)


@nox.session(python=VENVS["cpu"]["python"], default=False)
def mutants(session: nox.Session) -> None:
    """Plant faults into references and adapters, and demand that each turns a case red; needs no GPU."""
    _install(session, "cpu")
    session.run("refgrid", "mutants", "-n2", "--output=results/mutants", *session.posargs)


@nox.session(default=False)
def matrix(session: nox.Session) -> None:
    """Run what this machine can and has not run, then print the matrix; fails if it is red or nothing was proven."""
    _sync_with_sources(session)
    session.run("refgrid", "run", f"--nox={sys.executable}", *session.posargs, interrupt_timeout=ACCOUNTING_TIME)


@nox.session(default=False)
def ci(session: nox.Session) -> None:
    """Plan the jobs of a workflow, or merge their records: `-- plan ...`, `-- merge ...`; needs no torch."""
    _sync_with_sources(session)
    session.run("refgrid", "ci", *session.posargs)


@nox.session(default=False)
def render(session: nox.Session) -> None:
    """Write definitions/ from the references and their table of sizes; needs no torch."""
    _sync(session)
    session.install("--no-deps", "--editable=references")
    session.run("refgrid", "render", *session.posargs)


@nox.session(default=False)
def plan(session: nox.Session) -> None:
    """Count the cases that a run owes; needs no torch."""
    _sync_with_sources(session)
    session.run("refgrid", "plan", *session.posargs)


@nox.session(python=VENVS["cpu"]["python"], default=False)
def bench(session: nox.Session) -> None:
    """Time the instrument itself: collection, its share of a case, and the comparison of large outputs."""
    _install(session, "cpu")
    session.run("python", "-m", "refgrid.commands.bench", *session.posargs)


@nox.session(python=VENVS["cpu"]["python"], default=False)
def calibrate(session: nox.Session) -> None:
    """Measure everyone's error from float64 on this CPU, and derive the table of tolerances and its report."""
    _install(session, "cpu")
    session.run("refgrid", "calibrate", "--environment=cpu", *session.posargs)


@nox.session(name="bench-references", python=VENVS["cpu"]["python"], default=False)
def bench_references(session: nox.Session) -> None:
    """Time each reference against a plain loop over sequences, tokens or heads."""
    _install(session, "cpu")
    session.run("python", "tests/bench_references.py", *session.posargs)


@nox.session(default=False)
def wheelhouse(session: nox.Session) -> None:
    """Collect the wheels that a machine without index lacks: -- NAME [--have FILE] [--parts 60MiB] [--output DIR]."""
    _sync(session, "--group=test")
    session.run("refgrid", "wheelhouse", *session.posargs)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write uv.lock and ci/locks/ anew; name environments, or a CUDA, after `--` to write only their locks."""
    session.run_install("uv", "lock", env=NO_INDEX_SETTINGS)
    _sync(session, "--group=test")
    session.run("refgrid", "lock", *session.posargs)


@nox.session(venv_backend="none", default=False)
def warm(session: nox.Session) -> None:
    """Compile ahead what an environment's ground truth compiles, in its own caches: `-- NAME`; needs no GPU."""
    name, *options = session.posargs or [""]
    _in_environment(session, name, WARM, *options)


@nox.session(venv_backend="none", default=False)
def soak(session: nox.Session) -> None:
    """Run every case over fresh seeds and report each red: `-- [NAME] [--seeds 100] [--budget 30m] [--seed S]`."""
    named = bool(session.posargs) and not session.posargs[0].startswith("-")
    name, options = (session.posargs[0], session.posargs[1:]) if named else ("cpu", session.posargs)
    _in_environment(session, name, SOAK, *options)


@nox.session(name=GPU_TESTS, venv_backend="none", default=False)
def tests_gpu(session: nox.Session) -> None:
    """Run tests/gpu, which needs a GPU, in an environment: `-- NAME [pytest options]`."""
    name, *options = session.posargs or [""]
    _in_environment(session, name, GPU, *options)


@nox.session(name="bench-grouped", default=False)
def bench_grouped(session: nox.Session) -> None:
    """Time grouped attention beside what it replaces: `-- NAME [--shapes ...]`; then `-- --render`: tables and plot."""
    name, *options = session.posargs or [""]
    if name == "--render":
        _sync(session, "--group=bench")
        session.run("python", "-m", "grouped_bench", name, *options, env={"PYTHONPATH": "tests"})
    else:
        _in_environment(session, name, BENCH, *options)


def _in_environment(session: nox.Session, name: str, *told: str) -> None:
    """Go on in the session whose virtual environment it is."""
    if name not in ENVIRONMENTS:
        session.error(f"no environment is called {name!r}; legal values: {', '.join(ENVIRONMENTS)}")
    if (words := LOCKS / f"{name}.unresolvable.txt").exists():
        session.error(f"{name} cannot be resolved any more, see {words.relative_to(ROOT)}")
    session.notify(f"tests-{name}", posargs=told)


def _tests_session(name: str) -> None:
    """Declare `tests-<name>`."""
    entry = ENVIRONMENTS[name]

    def prove(session: nox.Session) -> None:
        mode, *options = session.posargs or [""]
        if mode == WARM:
            _use(session, name, "refgrid", "warm", f"--environment={name}", *options)
        elif mode == BENCH:
            _use(session, name, "grouped_bench", *options, env={"PYTHONPATH": str(ROOT / "tests")})
        elif mode == GPU:
            files = [] if any(".py" in option for option in options) else ["tests/gpu"]
            _use(session, name, "pytest", *OWN_PLUGINS, *files, *options)
        elif mode == SOAK:
            _use(session, name, "refgrid", "run-soak", *OWN_PLUGINS, *_arguments(session, name), audited=True)
        else:
            _prove(session, name)

    prove.__doc__ = f"Prove every reference in environment {name}, the versions of {entry['origin']}."
    python = False if _is_overlay(name) else entry["python"]
    nox.session(name=f"tests-{name}", python=python, tags=[entry["kind"], *_group(entry)], default=False)(prove)


def _is_overlay(name: str) -> bool:
    return bool(ENVIRONMENTS[name]["kind"] == "overlay")


def _group_session(group: str, names: list[str]) -> None:
    """Declare `tests-<CUDA>`: nox goes on after a red environment, and fails in the end."""

    def prove(session: nox.Session) -> None:
        for name in names:
            session.notify(f"tests-{name}", posargs=session.posargs)

    prove.__doc__ = f"Prove every reference in every virtual environment of this CUDA: {', '.join(names)}."
    nox.session(name=f"tests-{group}", venv_backend="none", default=False)(prove)


def _group(entry: dict[str, Any]) -> list[str]:
    """The CUDA as PyTorch's builds name it, "cu128"; none for the CPU."""
    return [f"cu{entry['cuda'].replace('.', '')}"] if "cuda" in entry else []


GROUPS = sorted({cuda for entry in VENVS.values() for cuda in _group(entry)} - set(VENVS))
for _name in ENVIRONMENTS:
    _tests_session(_name)
for _cuda in GROUPS:
    _group_session(_cuda, [name for name, entry in VENVS.items() if _group(entry) == [_cuda]])


def _refuse_unknown(words: list[str]) -> None:
    """Of a session that is not there nox says no more than that. What follows `--` goes to pytest."""
    asked = words[: words.index("--")] if "--" in words else words
    option = re.compile(r"^(--sessions?(=|$)|-[se]=?)")
    if not any(map(option.match, asked)):  # else nox does not read the variable
        asked = [*asked, *os.environ.get("NOXSESSION", "").split(",")]
    sessions = [option.sub("", word) for word in asked]
    named = (word for word in sessions if word.startswith("tests-") and word != GPU_TESTS)
    names = [re.sub(r"-3\.\d+$", "", word.removeprefix("tests-")) for word in named]
    if unknown := [name for name in names if name not in (*ENVIRONMENTS, *GROUPS)]:
        legal = ", ".join([*ENVIRONMENTS, *GROUPS])
        raise SystemExit(f"no environment is called {', '.join(map(repr, unknown))}; legal values: {legal}")


_refuse_unknown(sys.argv[1:])


def _use(
    session: nox.Session,
    name: str,
    *module: str,
    env: Mapping[str, str] = MappingProxyType({}),
    audited: bool = False,
) -> None:
    """Run a module where the libraries of an environment are; `audited`, after a look at a new virtual environment."""
    _prepare(session, name)
    if audited and not _is_overlay(name):
        _audit(session, name)
    _run(session, name, "-m", *module, env=env)


def _prepare(session: nox.Session, name: str) -> None:
    """Have the libraries of an environment; raises CommandFailed where that fails."""
    (_lay if _is_overlay(name) else _install)(session, name)


def _run(
    session: nox.Session, name: str, *words: str, env: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> Any:
    """Run the interpreter of an environment, with all it needs; `options` are those of `session.run`."""
    options["interrupt_timeout"] = ACCOUNTING_TIME
    if _is_overlay(name):
        overlay = ["python3", OVERLAY, "run", f"--target={_site(session, name)}", "--checkout=.", "--", "python3"]
        return session.run(*overlay, *words, env=env, **options)
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **_caches(session, name), **env}
    return session.run("python", *words, env=alone, **options)


def _lay(session: nox.Session, name: str) -> None:
    """The wheels that were carried here, over the python3 that the PATH leads to and its torch; at once if they are."""
    wheelhouse = Path(os.environ.get("REFGRID_WHEELHOUSE", "wheelhouse"))
    if not (wheelhouse / "manifest.json").exists():
        absent = f"{wheelhouse}: no wheelhouse is here; where there is an index: nox -s wheelhouse -- {name}"
        session.warn(absent)
        raise nox.command.CommandFailed(absent)
    laid = [f"--wheelhouse={wheelhouse}", f"--environment={name}", f"--target={_site(session, name)}"]
    _heard(session, "python3", OVERLAY, "lay", *laid)


def _site(session: nox.Session, name: str) -> Path:
    return Path(session.cache_dir, "overlays", name)


def _prove(session: nox.Session, name: str) -> None:
    """An environment that cannot be had ends in the matrix too: its cases take that verdict, with the words for it."""
    if (unresolvable := LOCKS / f"{name}.unresolvable.txt").exists():
        _record(session, name, "unresolvable", unresolvable)
        return
    if overlay := _is_overlay(name):
        _demand(session, name)  # at once where it was laid before, so that what is settled is that of today's wheels
    if _is_settled(session, name):
        return
    if not overlay:
        _demand(session, name)
        _audit(session, name)
    _run(session, name, "-m", "pytest", *OWN_PLUGINS, *_arguments(session, name))


def _demand(session: nox.Session, name: str) -> None:
    """Prepare an environment; if that fails, the record says why, and the session ends."""
    log = _install_log(session)
    log.unlink(missing_ok=True)
    try:
        _prepare(session, name)
    except nox.command.CommandFailed as failure:
        with log.open("a") as words:
            words.write(f"{failure.reason}\n")
        _record(session, name, "install-fail", log)
        session.error(f"{name} cannot be installed: {failure.reason}")


def _audit(session: nox.Session, name: str) -> None:
    """Is it what was asked for? An error ends the session here; what is odd, the records say too."""
    device = [argument for argument in _arguments(session, name) if argument.startswith("--device=")][-1]
    session.run("refgrid", "audit", f"--environment={name}", device, env=_caches(session, name))


def _is_settled(session: nox.Session, name: str) -> bool:
    """Whether nothing is due where this environment is already; then its record has been written."""
    if not (_is_overlay(name) or shutil.which("refgrid", path=session.bin)):
        return False
    # 1 = cases are due, or only pytest can tell; a broken environment ends otherwise, and is installed anew.
    asked = ["-m", "refgrid", "due", *_arguments(session, name)]
    told = str(_run(session, name, *asked, silent=True, success_codes=range(256))).strip()
    session.log(told)
    return "written: " in told


def _record(session: nox.Session, name: str, verdict: str, reason: Path) -> None:
    """What this run owes ends in the verdict. The session's environment is no use, so a light one records it."""
    uv, where = nox.virtualenv.UV, {"UV_PROJECT_ENVIRONMENT": str(Path(session.cache_dir, "record").absolute())}
    session.run_install(uv, "sync", "--locked", "--no-default-groups", env=where, external=True)
    light = f"--python={where['UV_PROJECT_ENVIRONMENT']}"
    session.run_install(uv, "pip", "install", "--quiet", light, "--no-deps", *SOURCES, external=True)
    told = ["--environment", name, "--verdict", verdict, "--reason-file", str(reason)]
    # 1 = red cases: the record was written, which is what was asked for here.
    command = [uv, "run", "--no-sync", "refgrid", "record-failure", *told, "--", *_arguments(session, name)]
    session.run(*command, env=where, success_codes=[0, 1], external=True)


def _arguments(session: nox.Session, name: str) -> list[str]:
    """Which cases, where, and on how many workers; what is asked for on the command line comes last and wins."""
    device = "cpu" if "cuda" not in ENVIRONMENTS[name] else _device(session)
    sizes = ["-n2", "--test-sizes=small", "--memory=2GiB"] if device == "cpu" else ["-nauto"]
    files = [] if any(".py" in argument for argument in session.posargs) else ["tests/references"]
    asked = [argument for argument in session.posargs if argument != SOAK]
    return [*files, f"--device={device}", f"--environment={name}", *CRASH_SAFE, *sizes, *asked]


def _device(session: nox.Session) -> str:
    """cuda if an NVIDIA driver lists a GPU, else cpu; says which and why."""
    tool = shutil.which("nvidia-smi")
    listed = session.run(tool, "--list-gpus", silent=True, success_codes=range(256), external=True) if tool else None
    gpus = [line for line in str(listed or "").splitlines() if line.startswith("GPU ")]
    session.log(f"nvidia-smi lists {len(gpus)} GPU(s)" if tool else "there is no nvidia-smi, so no GPU")
    return "cuda" if gpus else "cpu"


def _caches(session: nox.Session, name: str) -> dict[str, str]:
    """Compiled kernels of one version set must never be loaded by another; read before the interpreter starts."""
    folder, table = Path(session.cache_dir) / "kernels" / name, runpy.run_path(str(ROOT / OVERLAY))["CACHES"]
    return {"REFGRID_ENVIRONMENT": name, **{variable: str(folder / part) for variable, part in table.items()}}


def _sync(session: nox.Session, *groups: str) -> None:
    """The instrument as uv.lock pins it, without torch."""
    where = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "UV_PYTHON": session.virtualenv.location}
    session.run_install("uv", "sync", "--locked", "--no-default-groups", *groups, env=where)


def _sync_with_sources(session: nox.Session, *groups: str) -> None:
    """The sources too, which it can plan, but not run; built again only where a project file has changed."""
    made, now = Path(session.virtualenv.location, "made-of"), _projects()
    if made.is_file() and made.read_text() == now:
        _sync(session, *groups, "--inexact")  # which leaves them there
        return
    _sync(session, *groups)
    if session.run_install("uv", "pip", "install", "--no-deps", *SOURCES):  # under --no-install nothing is
        made.write_text(now)


def _projects() -> str:
    """What an editable install is made of: where the sources are, and what the project files and the lock say."""
    told = hashlib.sha256(str(ROOT).encode())
    for file in ("uv.lock", "pyproject.toml", *(f"{each.partition('=')[2]}/pyproject.toml" for each in SOURCES)):
        told.update((ROOT / file).read_bytes())
    return told.hexdigest()


def _install(session: nox.Session, name: str) -> None:
    """One environment exactly as its lock pins it, and the members of this workspace."""
    _heard(session, "uv", "pip", "sync", "--require-hashes", f"ci/locks/{name}.txt")
    if "cuda" not in ENVIRONMENTS[name]:
        _install_cpu_torch(session, next(pin for pin in ENVIRONMENTS[name]["pins"] if pin.startswith("torch==")))
    session.install("--no-deps", *MEMBERS)


def _heard(session: nox.Session, *command: str) -> None:
    """Install, and keep what the installer says: the record of a failure quotes it."""
    tee = shutil.which("tee")
    if tee is None:
        session.run_install(*command)
        return
    with subprocess.Popen([tee, str(_install_log(session))], stdin=subprocess.PIPE, text=True) as copy:
        session.run_install(*command, stdout=copy.stdin, stderr=subprocess.STDOUT)


def _install_log(session: nox.Session) -> Path:
    return Path(session.create_tmp(), "install.log").absolute()


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
    refused = f"no place serves {pin} for Python {platform.python_version()} on {platform.platform()}"
    session.warn(refused)
    raise nox.command.CommandFailed(refused)


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

"""The command `refgrid warm`: compile ahead what a run would compile at the first call, while it holds a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import click

from refgrid.dataset.case import Selection
from refgrid.dataset.definition import DataSet, Definition, DefinitionError, load_dataset
from refgrid.environments import kernel_cache
from refgrid.environments.audit import EXIT_CODE, audit_named
from refgrid.environments.declared import LOCAL, EnvironmentsError, EnvironmentSpec, declared_as, load_environments
from refgrid.environments.measured import Environment, gpus, measure
from refgrid.environments.toolchain import ToolchainError, add_headers, choose_architectures, nvcc
from refgrid.running.libraries import cut_short
from refgrid.sources import Sources
from refgrid.warming.compiler_slots import compiler_slots, compilers_that_fit, ninja_version
from refgrid.warming.late_compiles import Stamp, write_stamp
from refgrid.warming.progress import display
from refgrid.warming.warm import Built, WarmPlan, compile_modules, plan_warm

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--dataset", type=_FOLDER, default=".", help="Data set to compile for (default: this folder).")
@click.option("--table", type=click.Path(path_type=Path), default="ci/environments.toml", help="The environments.")
@click.option(
    "--environment",
    default=lambda: os.environ.get("REFGRID_ENVIRONMENT", LOCAL),
    metavar="NAME",
    help="What this interpreter is (default: REFGRID_ENVIRONMENT, else local, which nobody checks).",
)
@click.option("--op-type", multiple=True, metavar="T", help="Only this op_type; may be repeated.")
@click.option("--definition-name", multiple=True, metavar="N", help="Only this definition; may be repeated.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at once (default: what cores and memory hold).")
@click.option("--arch", default="", metavar="9.0a", help="Compute capability (default: that of this machine's GPUs).")
@click.option("--list", "list_only", is_flag=True, help="Say what would be compiled, and compile nothing.")
def warm(
    dataset: Path,
    table: Path,
    environment: str,
    op_type: tuple[str, ...],
    definition_name: tuple[str, ...],
    jobs: int | None,
    arch: str,
    *,
    list_only: bool,
) -> None:
    """Compile ahead what ground truth would compile at its first call; needs a compiler, but no GPU.

    Run it with the environment's own interpreter and caches, as `nox -s warm -- NAME` does.

    Exit 1 when a module failed.
    """
    sources = Sources()
    here = _audited(table, environment, sources)
    try:
        architectures = choose_architectures(arch)
        plan = _plan(dataset, Selection(op_type, definition_name), sources)
        if list_only:
            _print(plan, architectures)
            sys.exit(1 if plan.broken else 0)
        built = _compile(plan, here, architectures, jobs)
    except ToolchainError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    sys.exit(_summary(plan, built))


def _audited(table: Path, name: str, sources: Sources) -> Environment:
    """Modules that are compiled for another torch or CUDA than the name says would be worse than none."""
    environment = measure(name, "cuda" if gpus() else "cpu", sources.distributions)
    try:
        if name != LOCAL and table.exists():
            _demand_cuda(declared_as(name, load_environments(table)))
        errors = [each for each in audit_named(table, environment) if each.severity == "error"]
    except EnvironmentsError as error:
        _fail(str(error))
    for each in errors:
        click.echo(str(each), err=True)
    if errors:
        sys.exit(EXIT_CODE)
    return environment


def _demand_cuda(spec: EnvironmentSpec) -> None:
    """Where there is no CUDA, nothing is to be done, which is no failure."""
    if not spec.cuda:
        click.echo(f"nothing to compile ahead: environment {spec.name} has no CUDA")
        sys.exit(0)


def _plan(dataset: Path, selection: Selection, sources: Sources) -> WarmPlan:
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "error")  # it tells of each build, in the middle of the progress
    try:
        data = load_dataset(dataset)
        selection.check(data)
    except (DefinitionError, ValueError) as error:
        _fail(str(error))
    return plan_warm(_selected(data, selection), sources)


def _selected(data: DataSet, selection: Selection) -> Iterator[Definition]:
    for name, definition in data.definitions.items():
        named = not selection.definitions or name in selection.definitions
        if named and (not selection.op_types or definition.op_type in selection.op_types):
            yield definition


def _compile(plan: WarmPlan, here: Environment, architectures: str, jobs: int | None) -> list[Built]:
    if not plan.modules:
        return []
    compiler, ninja = nvcc(), ninja_version()
    if ninja is None:
        raise ToolchainError("no-compiler: there is no ninja on the PATH; install it with pip install ninja")
    for folder in add_headers(compiler):
        click.echo(f"headers that the toolkit of {compiler} lacks are taken from {folder}")
    for library in cut_short():
        click.echo(f"cut short, so it is compiled again: {library}")
        library.unlink()
    base, count = kernel_cache.flashinfer_base(), jobs or compilers_that_fit()
    kernel_cache.claim(base, here)
    with compiler_slots(count, ninja) as slot, display(len(plan.modules), count) as shown:
        built = compile_modules(plan.modules.values(), count, slot, shown)
    ready = tuple(sorted(each.name for each in built if not each.error))
    if not ready:  # a run would take for late what was never there ahead of it
        return built
    versions = {"torch": here.torch or "", "CUDA": here.cuda or "", "nvcc": here.toolkit or "", **here.libraries}
    click.echo(f"stamp: {write_stamp(base, Stamp(ready, architectures, versions))}")
    return built


def _summary(plan: WarmPlan, built: Sequence[Built]) -> int:
    """Every failure with the compiler's words; the exit status."""
    failed = {each.name: each.error for each in built if each.error}
    for name, error in {**plan.broken, **failed}.items():
        click.echo(f"error: {name}: {error}", err=True)
    compiled = sum(each.compiled and not each.error for each in built)
    wrong = len(failed) + len(plan.broken)
    told = f"{compiled} compiled, {len(built) - compiled - len(failed)} were there, {wrong} failed"
    click.echo(told if built or wrong else "nothing to compile ahead: " + _nothing(plan))
    return 1 if wrong else 0


def _nothing(plan: WarmPlan) -> str:
    """Why, of the sources that compile."""
    return "; ".join(dict.fromkeys(plan.absent.values())) or "no source of these definitions compiles modules"


def _print(plan: WarmPlan, architectures: str) -> None:
    """Lines, since a table would break FlashInfer's long names."""
    for name, module in sorted(plan.modules.items()):
        there = "there" if module.library.exists() else "missing"
        click.echo(f"{there:7}  {name} ({module.sources} sources, for {architectures})")
        click.echo(f"         loaded by {', '.join(plan.users[name])}")
    for title, told in (("compiled at the first call", plan.at_first_call), ("not served", plan.absent)):
        for reason in dict.fromkeys(told.values()):
            users = ", ".join(user for user, why in told.items() if why == reason)
            click.echo(f"{title}: {reason}: {users}")
    if plan.at_first_call:
        click.echo("What is compiled at the first call needs a GPU and cannot be compiled ahead.")
    for user, error in plan.broken.items():
        click.echo(f"error: {user}: {error}", err=True)


def _fail(reason: str) -> NoReturn:
    raise click.UsageError(reason)

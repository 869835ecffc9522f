"""`python -m grouped_bench`: time the shapes that are asked for, write a line each, then tables and a plot of them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grouped_bench import goals
from grouped_bench.report import markdown, plot, read, write_csv

if TYPE_CHECKING:
    from grouped_bench.shapes import Shape

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--shapes", "patterns", multiple=True, help="Names of shapes, such as zigzag-8B-*; may be repeated.")
@click.option("--backends", default="fa3,triton,torch", show_default=True, help="Which, if they can run here.")
@click.option("--rounds", default=15, show_default=True, help="How often each way has its turn.")
@click.option("--device", default="cuda", show_default=True, help="cpu times nothing of interest; it tests this.")
@click.option("--output", type=_FOLDER, default="results/grouped", show_default=True, help="Folder of what is written.")
@click.option("--bytes", "counted", is_flag=True, help="Count what is read from memory instead, by ncu, forward.")
@click.option("--plan", "planned", is_flag=True, help="Only time what this host takes to plan; --device cpu will do.")
@click.option(
    "--render", is_flag=True, help="Only write tables and plot of what was measured; needs matplotlib, no torch."
)
@click.option("--list", "listed", is_flag=True, help="Only list the shapes.")
def main(
    patterns: tuple[str, ...],
    backends: str,
    rounds: int,
    device: str,
    output: Path,
    *,
    counted: bool,
    planned: bool,
    render: bool,
    listed: bool,
) -> None:
    """Time grouped attention beside what it replaces; a shape that was measured is not measured again."""
    file = output / "grouped.ndjson"  # not .jsonl, as records of cases are
    if listed:
        click.echo("\n".join(_names(patterns)))
        return
    failed: list[str] = []
    if counted:
        failed = _count(patterns, backends.split(","), file)
    elif planned:
        _plan(backends.split(","), device, file)
    elif not render:
        failed = _measure(patterns, backends.split(","), rounds, device, file)
    if not file.exists():
        raise click.UsageError(f"{file} is not there: measure first")
    rows = read(file)
    write_csv(rows, output / "grouped.csv")
    (output / "grouped.md").write_text(markdown(rows, _names(())), encoding="utf-8")
    (output / "goals.md").write_text(goals.page(rows), encoding="utf-8")
    if render:
        plot(rows, output / "grouped.png")
    click.echo(f"written: {output}/grouped.csv, grouped.md, goals.md{', grouped.png' if render else ''}")
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}")


def _names(patterns: Sequence[str]) -> list[str]:
    """In the order of the patterns, none twice."""
    from grouped_bench.shapes import shapes

    every = [shape.name for shape in shapes()]
    found: list[str] = []
    for pattern in patterns or ["*"]:
        fitting = [name for name in every if fnmatch(name, pattern)]
        if not fitting:
            raise click.UsageError(f"--shapes {pattern!r} is none; --list tells them")
        found += fitting
    return list(dict.fromkeys(found))


def _chosen(patterns: Sequence[str]) -> list[Shape]:
    from grouped_bench.shapes import shapes

    by_name = {shape.name: shape for shape in shapes()}
    return [by_name[name] for name in _names(patterns)]


def _measure(patterns: Sequence[str], backends: Sequence[str], rounds: int, device: str, file: Path) -> list[str]:
    """Those that failed."""
    import torch

    from grouped_bench.measure import measure

    file.parent.mkdir(parents=True, exist_ok=True)
    return measure(_chosen(patterns), backends, rounds, torch.device(device), file)


def _plan(backends: Sequence[str], device: str, file: Path) -> None:
    import torch

    from grouped_bench.measure import plan

    file.parent.mkdir(parents=True, exist_ok=True)
    plan(backends, torch.device(device), file, click.echo)


def _count(patterns: Sequence[str], backends: Sequence[str], file: Path) -> list[str]:
    """Those that failed."""
    from grouped_bench.traffic import count

    file.parent.mkdir(parents=True, exist_ok=True)
    return count(_chosen(patterns), backends, file, click.echo)


if __name__ == "__main__":
    main()

"""`refgrid calibrate`: measures how far everyone is from float64, and derives the table of tolerances from it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--dataset", type=_FOLDER, default=".", help="Data set to use (default: this folder).")
@click.option("--environment", default="local", help="Name of what is measured; also the file's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to measure.")
@click.option("--seeds", type=click.IntRange(min=1), default=300, show_default=True, help="Draws of each op.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated. Implies --no-derive.")
@click.option("-n", "processes", type=click.IntRange(min=1), default=2, show_default=True, help="Processes.")
@click.option("--results", type=_FOLDER, default="results", help="Folder of the records; measurements in calibration/.")
@click.option("--measure/--no-measure", default=True, help="Measure here, or take the measurements that there are.")
@click.option("--derive/--no-derive", default=True, help="Write the table and the report.")
def calibrate(
    dataset: Path,
    environment: str,
    device: str,
    seeds: int,
    ops: tuple[str, ...],
    processes: int,
    results: Path,
    *,
    measure: bool,
    derive: bool,
) -> None:
    """Measure errors against float64 and derive the table of tolerances; exit 1 when a bound does not hold."""
    from refgrid.calibration.run import Plan

    if measure:
        _measure(Plan(dataset.resolve(), device, seeds, ops, processes), environment, results / "calibration")
    if derive and not ops:
        _derive(results, dataset)


def _measure(plan: object, environment: str, folder: Path) -> None:
    from refgrid.calibration.run import Plan, measured, written
    from refgrid.dataset.definition import DefinitionError
    from refgrid.environments.measured import measure
    from refgrid.sources import Sources

    assert isinstance(plan, Plan)
    _demand_ops(plan.ops, Sources().ops)
    try:
        for told in measured(plan, measure(environment, plan.device, Sources().distributions)):
            if isinstance(told, str):
                click.echo(f"measured: {told}")
            else:
                file = folder / f"{environment}.json"
                written(told, file)
                click.echo(f"written: {file}")
    except DefinitionError as error:
        raise click.UsageError(str(error)) from error


def _demand_ops(asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    for op in asked:
        if op not in known:
            raise click.UsageError(f"--op {op!r} is not known; legal values: {', '.join(known)}")


def _derive(results: Path, dataset: Path) -> None:
    """Written even where a bound does not hold: the report shows by how much."""
    from refgrid.calibration.derive import failures
    from refgrid.calibration.report import report
    from refgrid.calibration.table import measurements, rows, write
    from refgrid.dataset.definition import load_dataset
    from refgrid.proving.tolerance import CALIBRATED

    measured = measurements(results / "calibration")
    if not measured:
        raise click.UsageError(f"{results / 'calibration'} holds no measurement; run without --no-measure")
    found = rows(measured, results, load_dataset(dataset.resolve()))
    told = results / "calibration" / "report.md"
    told.write_text(report(measured, found), encoding="utf-8")
    write(found, CALIBRATED)
    click.echo(f"written: {CALIBRATED.name} with {len(found)} rows, {told}")
    beyond = failures(found)
    for line in beyond:
        click.echo(f"does not hold: {line}", err=True)
    sys.exit(1 if beyond else 0)

"""`refgrid calibrate`: measures how far everyone is from float64, and derives the table of tolerances from it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refgrid.commands.duration import duration

if TYPE_CHECKING:
    from refgrid.calibration.run import Plan
    from refgrid.environments.measured import Environment

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--dataset", type=_FOLDER, default=".", help="Data set to use (default: this folder).")
@click.option("--environment", default="local", help="Name of what is measured; also the file's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to measure.")
@click.option("--seeds", type=click.IntRange(min=1), default=360, show_default=True, help="Draws of each op.")
@click.option(
    "--op",
    "ops",
    multiple=True,
    metavar="OP",
    help="Only this op, the others stay; may be repeated: in this order. Implies --no-derive.",
)
@click.option("-n", "processes", type=click.IntRange(min=1), default=2, show_default=True, help="Processes.")
@click.option("--budget", callback=duration, metavar="3m", help="When it is spent, no more draws begin.")
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
    budget: int | None,
    results: Path,
    *,
    measure: bool,
    derive: bool,
) -> None:
    """Measure errors against float64 and derive the table of tolerances.

    Ends 1, once all is written, when a bound does not hold, a truth is beyond the three-way bound or has no row without
    a reason, or a source broke while it was measured. Also where the budget did not suffice; ops that are done stay.
    """
    from refgrid.calibration.run import Plan

    used: list[dict[str, Any]] = []
    holds = True
    if measure:
        plan = Plan(dataset.resolve(), device, seeds, ops, processes, math.inf if budget is None else budget)
        used = [_measure(plan, environment, results / "calibration")]
        if device == "cpu":
            _measure_besides(plan, environment, results / "calibration")
    if derive and not ops:
        used = _measurements(results / "calibration")
        holds = _derive(used, results, dataset)
    sys.exit(0 if _none_broke(used) and holds else 1)


def _measure(plan: Plan, environment: str, folder: Path) -> dict[str, Any]:
    from refgrid.calibration.joined import joined
    from refgrid.calibration.run import measured, written
    from refgrid.dataset.definition import DefinitionError
    from refgrid.environments.measured import measure
    from refgrid.running.dealing import DealingError
    from refgrid.sources import Sources

    _demand_ops(plan.ops, Sources().ops)
    here, file = measure(environment, plan.device, Sources().distributions), folder / f"{environment}.json"
    earlier = _earlier(file, here, plan)
    found: dict[str, Any] = {}
    try:
        for op, found in measured(plan, here):
            written(joined(found, earlier) if earlier else found, file)
            click.echo(f"measured: {op}")
    except DefinitionError as error:
        raise click.UsageError(str(error)) from error
    except DealingError as error:
        raise click.ClickException(f"{error}; {file} holds what was measured, --op completes it") from error
    if not found:
        raise click.UsageError(f"{plan.root} has no workload that is small enough to be drawn again and again")
    if not plan.ops:
        written(found, file)  # without what an earlier one has of ops that are no more
    click.echo(f"written: {file}")
    return found


def _measure_besides(plan: Plan, environment: str, folder: Path) -> None:
    """False alarms of random samples and rows over the length of sums, each as a whole with any of its ops.

    On a CPU alone: no device changes the former, and a GPU's leases are those of the processes that measure errors.
    """
    import torch

    from refgrid.calibration import samples, sums
    from refgrid.calibration.run import written
    from refgrid.dataset.definition import load_dataset
    from refgrid.environments.measured import measure
    from refgrid.sources import Sources

    torch.set_num_threads(1)
    dataset, here = load_dataset(plan.root), measure(environment, plan.device, Sources().distributions)
    wanted = {*(plan.ops or Sources().ops)}
    if wanted & {*samples.random_ops(dataset, Sources())}:
        written(samples.measured(dataset, here), folder / "samples" / f"{environment}.json")
        click.echo("measured: false alarms of random samples")
    if wanted & {*sums.ops(dataset)}:
        written(sums.measured(dataset, here), folder / "sums" / f"{environment}.json")
        click.echo("measured: rows over the length of sums")


def _earlier(file: Path, here: Environment, plan: Plan) -> dict[str, Any] | None:
    """What is known of ops until they are measured here; of another environment nothing is, and --op is refused."""
    from refgrid.calibration.joined import OtherEnvironment, demand_same

    if not file.exists():
        return None
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    try:
        demand_same(earlier, here, plan.seeds)
    except OtherEnvironment as error:
        if plan.ops:
            raise click.UsageError(f"{file}: {error}") from error
        return None
    return earlier


def _demand_ops(asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    for op in asked:
        if op not in known:
            raise click.UsageError(f"--op {op!r} is not known; legal values: {', '.join(known)}")


def _measurements(folder: Path) -> list[dict[str, Any]]:
    from refgrid.calibration.table import measurements

    found = measurements(folder)
    if not found:
        raise click.UsageError(f"{folder} holds no measurement; run without --no-measure")
    return found


def _derive(measured: list[dict[str, Any]], results: Path, dataset: Path) -> bool:
    """Whether every bound holds; written even where one does not: the report shows by how much."""
    from refgrid.calibration import alarms, growth
    from refgrid.calibration.beyond import unexplained
    from refgrid.calibration.derive import failures
    from refgrid.calibration.report import report
    from refgrid.calibration.table import committed, measurements, rows, write
    from refgrid.calibration.underived import matched, unstated
    from refgrid.dataset.definition import load_dataset
    from refgrid.proving.tolerance import CALIBRATED

    data = load_dataset(dataset.resolve())
    runs = committed(results)
    found = rows(measured, runs, data)
    told = results / "calibration" / "report.md"
    samples, sums = (measurements(told.parent / name) for name in ("samples", "sums"))
    told.write_text(report(measured, found, data, samples, sums), encoding="utf-8")
    write(found, CALIBRATED)
    click.echo(f"written: {CALIBRATED.name} with {len(found)} rows, {told}")
    beyond = [*failures(found), *unexplained(found), *unstated(found, matched(runs, data))]
    beyond += [line for each in samples for line in alarms.unsound(each)]
    beyond += [line for each in sums for line in growth.unsound(each)]
    for line in beyond:
        click.echo(f"does not hold: {line}", err=True)
    return not beyond


def _none_broke(measured: list[dict[str, Any]]) -> bool:
    """Whether no source did, of the measurements that were used."""
    from refgrid.calibration.broken import ADVICE, broken

    lines = [line for measurement in measured for line in broken(measurement)]
    for line in lines:
        click.echo(f"broken: {line}", err=True)
    if lines:
        click.echo(ADVICE, err=True)
    return not lines

"""The command `refgrid keep`: a run's records become evidence that can be committed."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--results", type=_FOLDER, default="results", show_default=True, help="Folder of the kept records.")
def keep(files: tuple[Path, ...], results: Path) -> None:
    """Pack the runs of record FILES into the committed file of their environment and kind of machine."""
    from refgrid.records.kept import keep as keep_runs
    from refgrid.records.record import RecordError
    from refgrid.running.recorder import column_name

    try:
        kept = keep_runs(files, results, column_name)
    except RecordError as error:
        raise click.UsageError(str(error)) from error
    for file, runs in kept.items():
        click.echo(f"{file}: {runs} run{'s' if runs != 1 else ''}, {file.stat().st_size / 2**20:.1f} MiB")

"""An option that is a duration, such as 20m."""

from __future__ import annotations

import click

from refgrid.running.budget import parse_duration


def duration(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """Its seconds; None where it is not given."""
    try:
        return None if text is None else parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error

"""`python -m refgrid`, for interpreters over which wheels were laid: these come without scripts."""

from refgrid.cli import main

main(prog_name="refgrid")

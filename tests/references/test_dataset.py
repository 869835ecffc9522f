"""Every definition that has no class of its own: all of a foreign `--dataset`, and what is new in this one."""

from refgrid.contract import ReferenceContract


class TestDataset(ReferenceContract):
    """The whole contract, for each such definition."""

"""The contract that every definition's test class inherits; the plugin fills in `case` and `proven`.

Nothing here imports torch: collecting the whole data set costs seconds less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from refgrid.dataset.case import Case, Size

Prove = Callable[[Case], None]


class ReferenceContract:
    """What a reference must fulfil, one test method a kind of case.

    `definition_name` names the definition; None stands for every definition that has no class of its own.
    `test_sizes` and `tolerance` hold unless the options of the same name are given; a tolerance looser than the source
    documents' table needs `tolerance_reason`.
    """

    definition_name: ClassVar[str | None] = None
    test_sizes: ClassVar[tuple[Size, ...] | None] = None
    tolerance: ClassVar[float | None] = None
    tolerance_reason: ClassVar[str] = ""

    def test_definition(self, case: Case, prove: Prove) -> None:
        """The definition's file can be used; this runs only where it cannot."""
        prove(case)

    def test_output_shape(self, case: Case, prove: Prove) -> None:
        """Each output has the shape that the definition gives it."""
        prove(case)

    def test_output_dtype(self, case: Case, prove: Prove) -> None:
        """Each output has the dtype that the definition gives it."""
        prove(case)

    def test_numerical_correctness(self, case: Case, prove: Prove) -> None:
        """The reference agrees with one source at a serving size."""
        prove(case)

    def test_edge_cases(self, case: Case, prove: Prove) -> None:
        """The reference agrees with one source at a hostile size."""
        prove(case)

    def test_sources_agree(self, case: Case, prove: Prove) -> None:
        """The sources that can run here agree with each other."""
        prove(case)

    def test_determinism(self, case: Case, prove: Prove) -> None:
        """Two runs on equal inputs at different addresses give the same bits."""
        prove(case)


def method_of(case: Case) -> str:
    """The method of the contract that proves a case."""
    if case.check == "numerics":
        return "test_edge_cases" if case.edge else "test_numerical_correctness"
    return {
        "definition": "test_definition",
        "shape": "test_output_shape",
        "dtype": "test_output_dtype",
        "agreement": "test_sources_agree",
        "determinism": "test_determinism",
    }[case.check]


METHODS = frozenset(name for name in vars(ReferenceContract) if name.startswith("test_") and name != "test_sizes")

"""A data set of one op, `double`, in a folder of its own, with a ground truth of its own in a provider beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refgrid.records.record import Outcome, Run, read_runs

PROVIDER = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    library: str = "torch"
    distribution: str = "torch"
    ops: tuple = {ops}

class Unavailable(Exception):
    def __init__(self, verdict, reason):
        self.verdict, self.reason = verdict, reason

SOURCES = (Source("sum"), Source("absent"))

def adapter(source, op, device):
    if source == "absent":
        raise Unavailable("missing", "absent is not installed")
    return globals()["truth_of_" + op]

{truths}
"""
TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"
"""
TRUTH = 'return {"y": x + x}'


class Project:
    """A checkout with one definition, its test file and a ground-truth provider."""

    def __init__(self, root: Path, definition: dict[str, Any], write_definition: Any) -> None:
        self.root, self.definition, self.write_definition = root, definition, write_definition
        (root / "test_double.py").write_text(TESTS)
        (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
        self.truth(double=TRUTH)

    def reference(self, body: str, *batch_sizes: int, name: str = "double_n4") -> None:
        """The body of `run(x)`; torch is imported."""
        text = "import os, time, torch\n\ndef run(x):\n    " + body.replace("\n", "\n    ") + "\n"
        self.write_definition({**self.definition, "name": name, "reference": text}, *(batch_sizes or (1, 2)))

    def truth(self, **bodies: str) -> None:
        """The body of the ground truth of each op; `x` is its input."""
        truths = [f"def truth_of_{op}(x):\n    " + body.replace("\n", "\n    ") for op, body in bodies.items()]
        provider = PROVIDER.replace("{ops}", repr(tuple(bodies))).replace("{truths}", "\n\n".join(truths))
        (self.root / "provider.py").write_text(provider)
        info = self.root / "provider-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: provider\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[refgrid.sources]\nprovider = provider\n")

    def expect_mismatch(self) -> None:
        """Call a mismatch with the provider a known failure."""
        (self.root / "ci").mkdir()
        (self.root / "ci" / "expected_failures.toml").write_text(
            '[[expected]]\ncases = ["*-sum"]\nenvironments = ["*"]\nverdict = "mismatch"\n'
            'reason = "wrong on purpose"\nlink = "https://example.org"\n'
        )

    def command(self, *arguments: str) -> list[str]:
        without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"]  # the last two take long
        return [sys.executable, "-m", "pytest", *without, "--device", "cpu", *arguments]

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.root, env=self.variables, capture_output=True, text=True, check=False
        )

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """A run to interfere with; it listens to Ctrl-C even where the caller was started in the background."""
        process = subprocess.Popen(
            self.command(),
            cwd=self.root,
            env=self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)

    def records(self) -> Run:
        (run,) = read_runs(self.root / "results")
        return run

    def verdicts(self) -> dict[str, str]:
        """Verdict by case, without the definition's name."""
        return {o.case.id.removeprefix("double_n4-"): o.verdict.value for o in self.records().accounted()}

    def outcome(self, case: str) -> Outcome:
        return self.records().outcomes[f"double_n4-{case}"]

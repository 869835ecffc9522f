"""Faults on a real GPU: `pytest tests/gpu` on a machine that has one. Other runs do not look into this folder.

One run with a worker a GPU, in which each definition has one fault that strikes once; whatever else there is must have
its own true result. With `--junitxml` pytest's report tells what became of each, to be kept by tests/kept_faults.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from fault_table import FAULTS, Fault
from fleet import CRASH_SAFE, Fleet, overlapping
from kept_faults import FAULT

from refgrid.records.record import Outcome, Verdict
from refgrid.running.devices import visible_devices

TRUTH = 'return {"y": x + x}'
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def astray(pointer):
    tl.store(pointer + (1 << 44), 1.0)
"""


class Gpus(Fleet):
    """A fleet of the GPUs that are there."""

    @property
    def variables(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.root), os.environ.get("PYTHONPATH", "")])
        plugins = "xdist.plugin,refgrid.plugin" if "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ else ""
        real = {**super().variables, "PYTHONPATH": path, "PYTEST_PLUGINS": plugins}
        return {name: value for name, value in real.items() if name != "REFGRID_FAKE_GPUS"}

    def lost(self, fault: Fault, device: str) -> float | None:
        """Seconds from the fault until a case, or the meeting, began on its GPU; None where none did."""
        struck = (self.root / f"{fault.name}.once").stat().st_mtime
        began = [*(use.began for use in self.uses if use.device == device), *filter(None, [self.met.get(device)])]
        return round(min(after) - struck, 1) if (after := [at for at in began if at > struck]) else None


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory, pristine_double: dict[str, Any], writer_below: Any) -> Gpus:
    root = tmp_path_factory.mktemp("faults")
    fleet = Gpus(root, pristine_double, writer_below(root))
    (root / "astray.py").write_text(KERNEL)
    for fault in FAULTS:
        body = f"import planted\nif planted.once('{fault.name}'): {fault.strike}\nreturn planted.used(x)"
        fleet.reference(body, 1, 2, name=f"{fault.name}_n4")
    fleet.reference("import planted\nreturn planted.used(x)", *range(1, 17), name="sound_n4")
    fleet.truth(**dict.fromkeys([*(fault.name for fault in FAULTS), "sound"], TRUTH))
    fleet.meet_at_last(len(visible_devices()))
    done = fleet.run("-n", "auto", *CRASH_SAFE, "--case-timeout", "1m")
    print(done.stdout, done.stderr)  # noqa: T201 - what is wrong on a machine that is hard to come by
    return fleet


@pytest.fixture(scope="module")
def outcomes(gpus: Gpus) -> dict[str, Outcome]:
    return dict(gpus.records().outcomes)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_guilty_case_is_named_with_its_verdict(
    gpus: Gpus, outcomes: dict[str, Outcome], fault: Fault, record_testsuite_property: Callable[[str, object], None]
) -> None:
    (guilty,) = [
        outcome
        for outcome in outcomes.values()
        if outcome.case.definition == f"{fault.name}_n4" and outcome.verdict.value not in {"match", "missing"}
    ]

    told = {"fault": fault.name, "planted": fault.strike, "verdict": guilty.verdict.value, "reason": guilty.reason}
    lost = gpus.lost(fault, guilty.device.rpartition(" ")[2])
    record_testsuite_property(f"{FAULT}{fault.name}", json.dumps({**told, "seconds_without_the_gpu": lost}))
    assert guilty.verdict.value == fault.verdict, guilty.reason
    assert fault.told in guilty.reason
    assert guilty.case.check == "shape"


def test_every_other_case_has_its_own_true_result(gpus: Gpus, outcomes: dict[str, Outcome]) -> None:
    counts = [outcome.verdict for outcome in outcomes.values()]
    absent = [o for o in outcomes.values() if o.case.id.endswith(("-absent", "-agreement"))]

    assert len(outcomes) == len(gpus.records().header.planned) == 12 * len(FAULTS) + 16 * 6
    assert {outcome.verdict for outcome in absent} == {Verdict.MISSING}
    assert counts.count(Verdict.MATCH) == len(outcomes) - len(absent) - len(FAULTS)


def test_each_gpu_was_used_under_its_uuid_after_all_faults_too(gpus: Gpus, outcomes: dict[str, Outcome]) -> None:
    devices = {device.uuid: device.told for device in visible_devices()}

    assert overlapping(gpus.uses) == []
    assert {use.device for use in gpus.uses} == set(devices)
    assert {outcome.device for outcome in outcomes.values()} == set(devices.values())
    assert set(gpus.met) == set(devices), "a GPU that lost its worker stayed idle"
    assert len(gpus.struck) == len(FAULTS)
    assert max(gpus.struck) <= max(gpus.met.values())

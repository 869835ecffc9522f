"""Which GPUs a run may use: what CUDA_VISIBLE_DEVICES means, and the devices that are only names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from refgrid.running import devices
from refgrid.running.devices import Device, DeviceError, Gpu, fake_gpus, told_devices, visible_devices, visible_of

GIB = 2**30


def gpu(uuid: str, *parts: str, name: str = "NVIDIA H200") -> Gpu:
    return Gpu(Device(uuid, name, 140 * GIB), tuple(Device(part, f"{name} MIG", 20 * GIB) for part in parts))


FOUR = [gpu("GPU-a0"), gpu("GPU-a1"), gpu("GPU-b2"), gpu("GPU-b3")]
DIVIDED = [gpu("GPU-a0", "MIG-c0", "MIG-c1"), gpu("GPU-a1")]
UNEQUAL = [gpu("GPU-a0"), gpu("GPU-a1", name="NVIDIA L4")]


def uuids(gpus: list[Gpu], visible: str | None, **variables: str) -> list[str]:
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    return [device.uuid for device in visible_of(gpus, variables)]


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        pytest.param(FOUR, None, ["GPU-a0", "GPU-a1", "GPU-b2", "GPU-b3"], id="unset: all"),
        pytest.param(FOUR, "", [], id="empty: none"),
        pytest.param(FOUR, "-1", [], id="-1: none"),
        pytest.param(FOUR, "3,1", ["GPU-b3", "GPU-a1"], id="indices, in the caller's order"),
        pytest.param(FOUR, "2,-1,0", ["GPU-b2"], id="nothing after -1"),
        pytest.param(FOUR, "GPU-b2, GPU-a0", ["GPU-b2", "GPU-a0"], id="UUIDs"),
        pytest.param(FOUR, "GPU-b3,0", ["GPU-b3", "GPU-a0"], id="both"),
        pytest.param([gpu("GPU-a"), gpu("GPU-ab")], "GPU-a", ["GPU-a"], id="a whole UUID that begins another"),
        pytest.param(DIVIDED, None, ["MIG-c0", "MIG-c1", "GPU-a1"], id="the parts of a divided GPU"),
        pytest.param(DIVIDED, "MIG-c1", ["MIG-c1"], id="one part"),
        pytest.param(DIVIDED, "0,1", ["MIG-c0", "GPU-a1"], id="an index stands for the first part"),
        pytest.param(UNEQUAL, "GPU-a1", ["GPU-a1"], id="UUIDs are clear among unequal GPUs"),
        pytest.param([], None, [], id="no GPU"),
    ],
)
def test_the_callers_list_is_kept(gpus: list[Gpu], visible: str | None, expected: list[str]) -> None:
    assert uuids(gpus, visible) == expected


@pytest.mark.parametrize(
    ("gpus", "visible", "told"),
    [
        pytest.param(FOUR, "4", "'4' is no GPU of this machine; there are: 0: GPU-a0, 1: GPU-a1", id="index"),
        pytest.param(FOUR, "GPU-c", "'GPU-c' is no GPU of this machine", id="UUID"),
        pytest.param(FOUR, "GPU-b", "'GPU-b' fits 2 GPUs", id="too short"),
        pytest.param(FOUR, "0,GPU-a0", "names GPU-a0 twice", id="twice"),
        pytest.param(FOUR, "all", "'all' is no GPU", id="word"),
        pytest.param(DIVIDED, "GPU-a0", "'GPU-a0' is no GPU of this machine; there are: 0: MIG-c0", id="a divided GPU"),
        pytest.param([], "0", "there are: none", id="no GPU"),
        pytest.param(UNEQUAL, "0", "ambiguous among unequal GPUs (NVIDIA H200 GPU-a0, NVIDIA L4 GPU-a1)", id="order"),
    ],
)
def test_what_has_no_meaning_is_refused_with_what_there_is(gpus: list[Gpu], visible: str, told: str) -> None:
    with pytest.raises(DeviceError) as caught:
        uuids(gpus, visible)

    assert told in str(caught.value)
    assert f"CUDA_VISIBLE_DEVICES={visible!r}" in str(caught.value)


def test_an_index_among_unequal_gpus_is_clear_when_cuda_counts_as_nvml_does() -> None:
    assert uuids(UNEQUAL, "1", CUDA_DEVICE_ORDER="PCI_BUS_ID") == ["GPU-a1"]


def test_fake_devices_are_a_number_or_a_list_with_memory() -> None:
    assert [one.whole.uuid for one in fake_gpus("3")] == ["FAKE-0", "FAKE-1", "FAKE-2"]
    assert [(one.whole.uuid, one.whole.memory) for one in fake_gpus("a:1GiB, b:512MiB")] == [
        ("a", GIB),
        ("b", GIB / 2),
    ]
    assert [one.uuid for one in visible_devices({"REFGRID_FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,2"})] == [
        *("FAKE-1", "FAKE-2")
    ]


@pytest.mark.parametrize("text", ["many", "a", "a:", "a:lots", ":1GiB", "-1", "a:1GiB,"])
def test_other_fake_devices_are_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="should be a number, or uuid:memory") as caught:
        fake_gpus(text)

    assert f"REFGRID_FAKE_GPUS={text!r}" in str(caught.value)


def test_devices_are_told_with_their_memory() -> None:
    assert told_devices([Device("GPU-a", "NVIDIA H200", 140 * GIB)]) == "NVIDIA H200 GPU-a (140.0 GiB)"
    assert told_devices([]) == "none"


class Nvml:
    """NVML of a machine with one whole GPU and one that is cut into two parts, with room for seven."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True, memory: bool = True) -> None:
        self.driver, self.memory, self.open = driver, memory, 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def __getattr__(self, name: str) -> Any:
        return {
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: f"GPU-{i}",
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceGetName": lambda _: "NVIDIA H200",
            "nvmlDeviceGetMemoryInfo": self._info,
            "nvmlDeviceGetMigMode": self._mode,
            "nvmlDeviceGetMaxMigDeviceCount": lambda _: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._part,
        }[name]

    def _info(self, _: str) -> SimpleNamespace:
        if not self.memory:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=GIB)

    def _mode(self, handle: str) -> list[int]:
        if handle == "GPU-0":
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def _part(self, _: str, i: int) -> str:
        if i > 1:
            raise self.NVMLError("Not Found")
        return f"MIG-{i}"


def test_nvml_lists_gpus_and_the_parts_of_those_that_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)

    assert [device.uuid for device in visible_devices({})] == ["GPU-0", "MIG-0", "MIG-1"]
    assert nvml.open == 0


def test_a_gpu_without_memory_of_its_own_has_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(memory=False)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)

    assert {device.memory for device in visible_devices({})} == {float(psutil.virtual_memory().total)}


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(driver=False))

    assert visible_devices({}) == ()
    assert not devices.is_fake({})

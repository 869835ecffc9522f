"""The GPUs that a run may use: those that its caller sees, by UUID, without importing torch or starting CUDA.

An index in CUDA_VISIBLE_DEVICES counts the machine's GPUs, so a run inside a job of a scheduler stays inside its part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from refgrid.dataset.memory import parse_bytes, told_bytes

# "4", or "uuid:memory,uuid:memory": devices that are only names, to try leases and scheduling where there is no GPU.
# Cases then run on the CPU.
FAKE = "REFGRID_FAKE_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"

_FAKE_MEMORY = 16 * 2**30


class DeviceError(ValueError):
    """The caller asks for a GPU that is not there, or says it in a way that has no meaning."""


@dataclass(frozen=True)
class Device:
    """A GPU, or the part of one that MIG cut off: what CUDA_VISIBLE_DEVICES calls it, its name, its bytes of memory."""

    uuid: str
    name: str
    memory: float

    @property
    def told(self) -> str:
        """How records and messages call it."""
        return f"{self.name} {self.uuid}"


@dataclass(frozen=True)
class Gpu:
    """A physical GPU and, where MIG divides it, its parts, which then are all that can be used of it."""

    whole: Device
    parts: tuple[Device, ...] = ()

    @property
    def usable(self) -> tuple[Device, ...]:
        """What a process can compute on."""
        return self.parts or (self.whole,)


def visible_devices(variables: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The devices that this process may use; none without a GPU. Raises DeviceError naming what is wrong."""
    gpus = fake_gpus(variables[FAKE]) if variables.get(FAKE) else _machine()
    return visible_of(gpus, variables)


def is_fake(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the devices are only names."""
    return bool(variables.get(FAKE))


def visible_of(gpus: Sequence[Gpu], variables: Mapping[str, str]) -> tuple[Device, ...]:
    """Those of the machine's GPUs that the variables leave visible, in their order. Raises DeviceError."""
    given = variables.get(VISIBLE)
    if given is None:
        return tuple(device for gpu in gpus for device in gpu.usable)
    chosen: list[Device] = []
    for word in (word.strip() for word in given.split(",")):
        if word in {"", "-1"}:  # CUDA reads no further
            break
        device = _named(word, gpus, variables)
        if device in chosen:
            raise DeviceError(f"{VISIBLE}={given!r} names {device.uuid} twice; CUDA would show no GPU at all")
        chosen.append(device)
    return tuple(chosen)


def fake_gpus(text: str) -> tuple[Gpu, ...]:
    """Devices for tests. Raises DeviceError for what is neither a number nor a list."""
    if text.strip().isdecimal():
        return tuple(Gpu(Device(f"FAKE-{i}", "fake GPU", _FAKE_MEMORY)) for i in range(int(text)))
    return tuple(Gpu(_fake(entry.strip(), text)) for entry in text.split(","))


def _fake(entry: str, text: str) -> Device:
    uuid, _, memory = entry.partition(":")
    try:
        if not uuid:
            raise ValueError("a UUID is missing")
        return Device(uuid, "fake GPU", parse_bytes(memory))
    except ValueError as error:
        raise DeviceError(f"{FAKE}={text!r}: should be a number, or uuid:memory,...; {error}") from error


def _named(word: str, gpus: Sequence[Gpu], variables: Mapping[str, str]) -> Device:
    found = _at(int(word), gpus, variables) if word.isdecimal() else _beginning(word, gpus)
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{i}: {device.uuid}" for i, gpu in enumerate(gpus) for device in gpu.usable) or "none"
    problem = f"fits {len(found)} GPUs" if found else "is no GPU of this machine"
    raise DeviceError(f"{VISIBLE}={variables[VISIBLE]!r}: {word!r} {problem}; there are: {there}")


def _at(index: int, gpus: Sequence[Gpu], variables: Mapping[str, str]) -> tuple[Device, ...]:
    """NVML counts by PCI bus. CUDA puts the fastest first unless told otherwise, which differs among unequal GPUs."""
    if len({gpu.whole.name for gpu in gpus}) > 1 and variables.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        names = ", ".join(gpu.whole.told for gpu in gpus)
        raise DeviceError(
            f"{VISIBLE}={variables[VISIBLE]!r}: an index is ambiguous among unequal GPUs ({names}); "
            "give UUIDs, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return gpus[index].usable[:1] if index < len(gpus) else ()  # of a divided GPU CUDA takes the first part


def _beginning(word: str, gpus: Sequence[Gpu]) -> tuple[Device, ...]:
    """As CUDA does, so many letters of a UUID as tell it apart are enough."""
    devices = [device for gpu in gpus for device in gpu.usable]
    exact = [device for device in devices if device.uuid == word]
    return tuple(exact or (device for device in devices if device.uuid.startswith(word)))


def _machine() -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # no driver on this machine
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(Gpu(_device(pynvml, handle), tuple(_parts(pynvml, handle))) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def _device(nvml: Any, handle: Any) -> Device:
    return Device(str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle)), _memory(nvml, handle))


def _memory(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:  # a GPU that has none of its own
        return float(psutil.virtual_memory().total)


def _parts(nvml: Any, handle: Any) -> Iterator[Device]:
    try:
        divided, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return  # a GPU that cannot be divided
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if divided else 0):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
        except nvml.NVMLError:
            continue  # a place without a part
        yield _device(nvml, part)


def told_devices(devices: Sequence[Device]) -> str:
    """All of them with their memory, for messages."""
    return ", ".join(f"{device.told} ({told_bytes(device.memory)})" for device in devices) or "none"

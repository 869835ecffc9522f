"""The room for a case: how much of a device's memory this run gives a worker in any case.

What is free of a GPU depends on what its other workers hold at the time, so that no two outcomes name the same amount.
What they hold at most is known beforehand, and with it whether a case that did not fit had all that it could get here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress

from refgrid.dataset.memory import parse_bytes, share_of_gpu, told_bytes
from refgrid.running.devices import Device, DeviceError, visible_devices

# What a worker holds of its GPU beside its case: CUDA's context, the libraries' workspaces, and up to 4 GiB of small
# inputs. The most that was seen of ten on an H200 are 5.3 GiB each.
HELD = 6 * 2**30
_LACK = " are free for this worker"  # how refgrid.dataset.memory ends the reason of a case that does not fit
_FREE = re.compile(rf"; ([1-9][0-9.]* [KMG]?i?B){_LACK}$")


def sure_room(device: str, limit: float, workers: int) -> float:
    """Bytes that each of so many workers a GPU can count on, at most `limit`; infinite where nobody can say."""
    devices: Sequence[Device] = ()
    with suppress(DeviceError):
        devices = visible_devices() if device == "cuda" else ()
    return min(limit, max((_of_gpu(each.memory, workers) for each in devices), default=math.inf))


def _of_gpu(total: float, workers: int) -> float:
    """On a small GPU workers cannot hold as much."""
    return share_of_gpu(total - workers * min(HELD, total / (workers + 1)), workers=1)


def is_lack(reason: str) -> bool:
    """Whether a case was left out for want of memory."""
    return reason.endswith(_LACK)


def had_all(reason: str, room: float) -> bool:
    """Whether a case that did not fit had at least that much; nobody can say where that is infinite."""
    found = _FREE.search(reason)
    return found is not None and not math.isinf(room) and parse_bytes(found[1]) >= parse_bytes(told_bytes(room))

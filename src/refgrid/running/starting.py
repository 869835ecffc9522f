"""How xdist's workers start: all interpreters at once, where xdist waits for each before it starts the next."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from execnet import Group, XSpec
    from execnet.gateway import Gateway


def start_at_once(group: Group, specs: Sequence[XSpec]) -> None:
    """Make the gateways of all specs side by side; the group hands each of them out when it is asked to make it.

    Raises what making a gateway raises.
    """
    make = group.makegateway
    with ThreadPoolExecutor(max_workers=len(specs), thread_name_prefix="start") as pool:
        made = dict(zip([spec.id for spec in specs], pool.map(make, specs), strict=True))

    def hand_out(spec: XSpec) -> Gateway:
        """One that replaces a worker that died has another name."""
        return made.pop(spec.id) if spec.id in made else make(spec)

    group.makegateway = hand_out  # type: ignore[method-assign,assignment]  # xdist asks it by this name

"""What verdicts would follow from today, over all definitions and adapters: what kept reports are held against."""

from __future__ import annotations

from collections.abc import Mapping

from refgrid.caching.adapters import Adapters
from refgrid.caching.key import adapters_part, instrument_parts
from refgrid.caching.modules import Modules
from refgrid.dataset.definition import Definition
from refgrid.dataset.reference import text_hash
from refgrid.sources import Sources


def today(published: Mapping[str, Definition], sources: Sources) -> dict[str, dict[str, str]]:
    """Hashes, named as a soak's report names them."""
    return {
        "references": {name: text_hash(each.reference) for name, each in published.items()},
        "adapters": _adapters(sources),
        "parts": instrument_parts(Modules.of("refgrid")),
    }


def _adapters(sources: Sources) -> dict[str, str]:
    """Of each op and source, as the keys of its cases have it."""
    texts = Adapters(sources)
    served = [(op, name) for op in sources.ops for name in sources.serving(op)]
    return {f"{op} {name}": adapters_part({name: texts.hash(name, op) or "unknown"}) for op, name in served}

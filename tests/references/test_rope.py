"""Reference tests of op_type rope; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestRopeWithCosSinCacheNeoxStyleD128Rd64(ReferenceContract):
    """rope_with_cos_sin_cache_neox_style_d128_rd64, held against every source of rope_with_cos_sin_cache_neox_style."""

    definition_name = "rope_with_cos_sin_cache_neox_style_d128_rd64"

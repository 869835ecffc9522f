"""Reference tests of op_type gqa_grouped; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestGqaGroupedH32Kv8D128(ReferenceContract):
    """gqa_grouped_h32_kv8_d128, held against every source of gqa_grouped."""

    definition_name = "gqa_grouped_h32_kv8_d128"


class TestGqaGroupedH32Kv8D64(ReferenceContract):
    """gqa_grouped_h32_kv8_d64, held against every source of gqa_grouped."""

    definition_name = "gqa_grouped_h32_kv8_d64"


class TestGqaGroupedH64Kv8D128(ReferenceContract):
    """gqa_grouped_h64_kv8_d128, held against every source of gqa_grouped."""

    definition_name = "gqa_grouped_h64_kv8_d128"

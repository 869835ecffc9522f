"""Reference tests of op_type gqa_ragged; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestGqaRaggedPrefillCausalH16Kv2D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h16_kv2_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h16_kv2_d128"


class TestGqaRaggedPrefillCausalH20Kv4D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h20_kv4_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h20_kv4_d128"


class TestGqaRaggedPrefillCausalH24Kv8D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h24_kv8_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h24_kv8_d128"


class TestGqaRaggedPrefillCausalH32Kv16D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h32_kv16_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h32_kv16_d128"


class TestGqaRaggedPrefillCausalH32Kv4D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h32_kv4_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h32_kv4_d128"


class TestGqaRaggedPrefillCausalH32Kv8D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h32_kv8_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h32_kv8_d128"


class TestGqaRaggedPrefillCausalH5Kv1D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h5_kv1_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h5_kv1_d128"


class TestGqaRaggedPrefillCausalH6Kv1D128(ReferenceContract):
    """gqa_ragged_prefill_causal_h6_kv1_d128, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h6_kv1_d128"


class TestGqaRaggedPrefillCausalH8Kv1D256(ReferenceContract):
    """gqa_ragged_prefill_causal_h8_kv1_d256, held against every source of gqa_ragged_prefill_causal."""

    definition_name = "gqa_ragged_prefill_causal_h8_kv1_d256"

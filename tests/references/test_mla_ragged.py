"""Reference tests of op_type mla_ragged; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestMlaRaggedPrefillCausalH16Qk192Vo128(ReferenceContract):
    """mla_ragged_prefill_causal_h16_qk192_vo128, held against every source of mla_ragged_prefill_causal."""

    definition_name = "mla_ragged_prefill_causal_h16_qk192_vo128"


class TestMlaRaggedPrefillCausalH8Qk192Vo128(ReferenceContract):
    """mla_ragged_prefill_causal_h8_qk192_vo128, held against every source of mla_ragged_prefill_causal."""

    definition_name = "mla_ragged_prefill_causal_h8_qk192_vo128"

"""Reference tests of op_type mla_paged; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestMlaPagedDecodeH16Ckv512Kpe64Ps1(ReferenceContract):
    """mla_paged_decode_h16_ckv512_kpe64_ps1, held against every source of mla_paged_decode."""

    definition_name = "mla_paged_decode_h16_ckv512_kpe64_ps1"


class TestMlaPagedDecodeH16Ckv512Kpe64Ps64(ReferenceContract):
    """mla_paged_decode_h16_ckv512_kpe64_ps64, held against every source of mla_paged_decode."""

    definition_name = "mla_paged_decode_h16_ckv512_kpe64_ps64"


class TestMlaPagedDecodeH8Ckv512Kpe64Ps1(ReferenceContract):
    """mla_paged_decode_h8_ckv512_kpe64_ps1, held against every source of mla_paged_decode."""

    definition_name = "mla_paged_decode_h8_ckv512_kpe64_ps1"


class TestMlaPagedPrefillCausalH16Ckv512Kpe64Ps1(ReferenceContract):
    """mla_paged_prefill_causal_h16_ckv512_kpe64_ps1, held against every source of mla_paged_prefill_causal."""

    definition_name = "mla_paged_prefill_causal_h16_ckv512_kpe64_ps1"


class TestMlaPagedPrefillCausalH16Ckv512Kpe64Ps64(ReferenceContract):
    """mla_paged_prefill_causal_h16_ckv512_kpe64_ps64, held against every source of mla_paged_prefill_causal."""

    definition_name = "mla_paged_prefill_causal_h16_ckv512_kpe64_ps64"


class TestMlaPagedPrefillCausalH8Ckv512Kpe64Ps1(ReferenceContract):
    """mla_paged_prefill_causal_h8_ckv512_kpe64_ps1, held against every source of mla_paged_prefill_causal."""

    definition_name = "mla_paged_prefill_causal_h8_ckv512_kpe64_ps1"

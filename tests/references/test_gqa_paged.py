"""Reference tests of op_type gqa_paged; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestGqaPagedDecodeH16Kv2D128Ps1(ReferenceContract):
    """gqa_paged_decode_h16_kv2_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h16_kv2_d128_ps1"


class TestGqaPagedDecodeH16Kv2D128Ps64(ReferenceContract):
    """gqa_paged_decode_h16_kv2_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h16_kv2_d128_ps64"


class TestGqaPagedDecodeH20Kv4D128Ps1(ReferenceContract):
    """gqa_paged_decode_h20_kv4_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h20_kv4_d128_ps1"


class TestGqaPagedDecodeH20Kv4D128Ps64(ReferenceContract):
    """gqa_paged_decode_h20_kv4_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h20_kv4_d128_ps64"


class TestGqaPagedDecodeH24Kv4D128Ps64(ReferenceContract):
    """gqa_paged_decode_h24_kv4_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h24_kv4_d128_ps64"


class TestGqaPagedDecodeH24Kv8D128Ps1(ReferenceContract):
    """gqa_paged_decode_h24_kv8_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h24_kv8_d128_ps1"


class TestGqaPagedDecodeH24Kv8D128Ps64(ReferenceContract):
    """gqa_paged_decode_h24_kv8_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h24_kv8_d128_ps64"


class TestGqaPagedDecodeH32Kv16D128Ps1(ReferenceContract):
    """gqa_paged_decode_h32_kv16_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv16_d128_ps1"


class TestGqaPagedDecodeH32Kv16D128Ps64(ReferenceContract):
    """gqa_paged_decode_h32_kv16_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv16_d128_ps64"


class TestGqaPagedDecodeH32Kv4D128Ps1(ReferenceContract):
    """gqa_paged_decode_h32_kv4_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv4_d128_ps1"


class TestGqaPagedDecodeH32Kv4D128Ps64(ReferenceContract):
    """gqa_paged_decode_h32_kv4_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv4_d128_ps64"


class TestGqaPagedDecodeH32Kv8D128Ps1(ReferenceContract):
    """gqa_paged_decode_h32_kv8_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv8_d128_ps1"


class TestGqaPagedDecodeH32Kv8D128Ps64(ReferenceContract):
    """gqa_paged_decode_h32_kv8_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h32_kv8_d128_ps64"


class TestGqaPagedDecodeH48Kv8D128Ps1(ReferenceContract):
    """gqa_paged_decode_h48_kv8_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h48_kv8_d128_ps1"


class TestGqaPagedDecodeH5Kv1D128Ps1(ReferenceContract):
    """gqa_paged_decode_h5_kv1_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h5_kv1_d128_ps1"


class TestGqaPagedDecodeH6Kv1D128Ps1(ReferenceContract):
    """gqa_paged_decode_h6_kv1_d128_ps1, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h6_kv1_d128_ps1"


class TestGqaPagedDecodeH6Kv1D128Ps64(ReferenceContract):
    """gqa_paged_decode_h6_kv1_d128_ps64, held against every source of gqa_paged_decode."""

    definition_name = "gqa_paged_decode_h6_kv1_d128_ps64"


class TestGqaPagedPrefillCausalH16Kv1D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h16_kv1_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h16_kv1_d128_ps64"


class TestGqaPagedPrefillCausalH16Kv2D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h16_kv2_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h16_kv2_d128_ps1"


class TestGqaPagedPrefillCausalH16Kv2D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h16_kv2_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h16_kv2_d128_ps64"


class TestGqaPagedPrefillCausalH20Kv4D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h20_kv4_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h20_kv4_d128_ps1"


class TestGqaPagedPrefillCausalH20Kv4D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h20_kv4_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h20_kv4_d128_ps64"


class TestGqaPagedPrefillCausalH24Kv4D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h24_kv4_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h24_kv4_d128_ps1"


class TestGqaPagedPrefillCausalH24Kv4D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h24_kv4_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h24_kv4_d128_ps64"


class TestGqaPagedPrefillCausalH24Kv8D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h24_kv8_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h24_kv8_d128_ps1"


class TestGqaPagedPrefillCausalH24Kv8D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h24_kv8_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h24_kv8_d128_ps64"


class TestGqaPagedPrefillCausalH32Kv16D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv16_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv16_d128_ps1"


class TestGqaPagedPrefillCausalH32Kv16D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv16_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv16_d128_ps64"


class TestGqaPagedPrefillCausalH32Kv4D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv4_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv4_d128_ps1"


class TestGqaPagedPrefillCausalH32Kv4D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv4_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv4_d128_ps64"


class TestGqaPagedPrefillCausalH32Kv8D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv8_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv8_d128_ps1"


class TestGqaPagedPrefillCausalH32Kv8D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h32_kv8_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h32_kv8_d128_ps64"


class TestGqaPagedPrefillCausalH40Kv10D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h40_kv10_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h40_kv10_d128_ps1"


class TestGqaPagedPrefillCausalH5Kv1D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h5_kv1_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h5_kv1_d128_ps1"


class TestGqaPagedPrefillCausalH5Kv1D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h5_kv1_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h5_kv1_d128_ps64"


class TestGqaPagedPrefillCausalH6Kv1D128Ps1(ReferenceContract):
    """gqa_paged_prefill_causal_h6_kv1_d128_ps1, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h6_kv1_d128_ps1"


class TestGqaPagedPrefillCausalH6Kv1D128Ps64(ReferenceContract):
    """gqa_paged_prefill_causal_h6_kv1_d128_ps64, held against every source of gqa_paged_prefill_causal."""

    definition_name = "gqa_paged_prefill_causal_h6_kv1_d128_ps64"

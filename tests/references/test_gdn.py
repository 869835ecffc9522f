"""Reference tests of op_type gdn; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestGdnDecodeQk16V32D128KLast(ReferenceContract):
    """gdn_decode_qk16_v32_d128_k_last, held against every source of gdn_decode."""

    definition_name = "gdn_decode_qk16_v32_d128_k_last"


class TestGdnDecodeQk4V8D128KLast(ReferenceContract):
    """gdn_decode_qk4_v8_d128_k_last, held against every source of gdn_decode."""

    definition_name = "gdn_decode_qk4_v8_d128_k_last"


class TestGdnDecodeQk8V16D128KLast(ReferenceContract):
    """gdn_decode_qk8_v16_d128_k_last, held against every source of gdn_decode."""

    definition_name = "gdn_decode_qk8_v16_d128_k_last"


class TestGdnMtpQk16V32D128KLast(ReferenceContract):
    """gdn_mtp_qk16_v32_d128_k_last, held against every source of gdn_mtp."""

    definition_name = "gdn_mtp_qk16_v32_d128_k_last"


class TestGdnMtpQk4V8D128KLast(ReferenceContract):
    """gdn_mtp_qk4_v8_d128_k_last, held against every source of gdn_mtp."""

    definition_name = "gdn_mtp_qk4_v8_d128_k_last"


class TestGdnMtpQk8V16D128KLast(ReferenceContract):
    """gdn_mtp_qk8_v16_d128_k_last, held against every source of gdn_mtp."""

    definition_name = "gdn_mtp_qk8_v16_d128_k_last"


class TestGdnPrefillQk16V32D128KLast(ReferenceContract):
    """gdn_prefill_qk16_v32_d128_k_last, held against every source of gdn_prefill."""

    definition_name = "gdn_prefill_qk16_v32_d128_k_last"


class TestGdnPrefillQk4V8D128KLast(ReferenceContract):
    """gdn_prefill_qk4_v8_d128_k_last, held against every source of gdn_prefill."""

    definition_name = "gdn_prefill_qk4_v8_d128_k_last"


class TestGdnPrefillQk8V16D128KLast(ReferenceContract):
    """gdn_prefill_qk8_v16_d128_k_last, held against every source of gdn_prefill."""

    definition_name = "gdn_prefill_qk8_v16_d128_k_last"

"""Reference tests of op_type mamba_ssu; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestMambaSsuDecodeH128D64S128Ng8(ReferenceContract):
    """mamba_ssu_decode_h128_d64_s128_ng8, held against every source of mamba_ssu_decode."""

    definition_name = "mamba_ssu_decode_h128_d64_s128_ng8"


class TestMambaSsuDecodeH64D64S128Ng4(ReferenceContract):
    """mamba_ssu_decode_h64_d64_s128_ng4, held against every source of mamba_ssu_decode."""

    definition_name = "mamba_ssu_decode_h64_d64_s128_ng4"

"""Reference tests of op_type dsa_paged; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestDsaSparseAttentionH16Ckv512Kpe64Topk2048Ps1(ReferenceContract):
    """dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1, held against every source of dsa_paged."""

    definition_name = "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1"


class TestDsaSparseAttentionH16Ckv512Kpe64Topk2048Ps64(ReferenceContract):
    """dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64, held against every source of dsa_paged."""

    definition_name = "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64"


class TestDsaTopkIndexerFp8H64D128Topk2048Ps64(ReferenceContract):
    """dsa_topk_indexer_fp8_h64_d128_topk2048_ps64, held against every source of dsa_paged."""

    definition_name = "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64"

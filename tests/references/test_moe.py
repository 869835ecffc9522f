"""Reference tests of op_type moe; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestMoeFp8BlockScaleDsRoutingTopk8Ng1Kg1E384H7168I2048(ReferenceContract):
    """Held against every source of moe_fp8_block_scale_ds_routing."""

    definition_name = "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e384_h7168_i2048"


class TestMoeFp8BlockScaleDsRoutingTopk8Ng1Kg1E48H7168I2048(ReferenceContract):
    """Held against every source of moe_fp8_block_scale_ds_routing."""

    definition_name = "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048"


class TestMoeFp8BlockScaleDsRoutingTopk8Ng8Kg4E32H7168I2048(ReferenceContract):
    """Held against every source of moe_fp8_block_scale_ds_routing."""

    definition_name = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"


class TestMoeFp8BlockScaleRenormTopk10E128H2048I512(ReferenceContract):
    """moe_fp8_block_scale_renorm_topk10_e128_h2048_i512, held against every source of moe_fp8_block_scale_renorm."""

    definition_name = "moe_fp8_block_scale_renorm_topk10_e128_h2048_i512"


class TestMoeFp8BlockScaleRenormTopk8E128H2048I768(ReferenceContract):
    """moe_fp8_block_scale_renorm_topk8_e128_h2048_i768, held against every source of moe_fp8_block_scale_renorm."""

    definition_name = "moe_fp8_block_scale_renorm_topk8_e128_h2048_i768"


class TestMoeFp8BlockScaleRenormTopk8E128H4096I1536(ReferenceContract):
    """moe_fp8_block_scale_renorm_topk8_e128_h4096_i1536, held against every source of moe_fp8_block_scale_renorm."""

    definition_name = "moe_fp8_block_scale_renorm_topk8_e128_h4096_i1536"


class TestTrtllmFp4BlockScaleMoeTopk10E128H2048I512(ReferenceContract):
    """trtllm_fp4_block_scale_moe_topk10_e128_h2048_i512, held against every source of trtllm_fp4_block_scale_moe."""

    definition_name = "trtllm_fp4_block_scale_moe_topk10_e128_h2048_i512"


class TestTrtllmFp4BlockScaleMoeTopk1E128H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_moe_topk1."""

    definition_name = "trtllm_fp4_block_scale_moe_topk1_e128_h5120_i8192"


class TestTrtllmFp4BlockScaleMoeTopk1E16H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_moe_topk1."""

    definition_name = "trtllm_fp4_block_scale_moe_topk1_e16_h5120_i8192"


class TestTrtllmFp4BlockScaleMoeTopk8E128H2048I768(ReferenceContract):
    """trtllm_fp4_block_scale_moe_topk8_e128_h2048_i768, held against every source of trtllm_fp4_block_scale_moe."""

    definition_name = "trtllm_fp4_block_scale_moe_topk8_e128_h2048_i768"


class TestTrtllmFp4BlockScaleMoeTopk8E64H4096I1536(ReferenceContract):
    """trtllm_fp4_block_scale_moe_topk8_e64_h4096_i1536, held against every source of trtllm_fp4_block_scale_moe."""

    definition_name = "trtllm_fp4_block_scale_moe_topk8_e64_h4096_i1536"


class TestTrtllmFp4BlockScaleRoutedMoeTopk10E128H2048I512(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_routed_moe."""

    definition_name = "trtllm_fp4_block_scale_routed_moe_topk10_e128_h2048_i512"


class TestTrtllmFp4BlockScaleRoutedMoeTopk1E128H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_routed_moe."""

    definition_name = "trtllm_fp4_block_scale_routed_moe_topk1_e128_h5120_i8192"


class TestTrtllmFp4BlockScaleRoutedMoeTopk1E16H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_routed_moe."""

    definition_name = "trtllm_fp4_block_scale_routed_moe_topk1_e16_h5120_i8192"


class TestTrtllmFp4BlockScaleRoutedMoeTopk8E128H2048I768(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_routed_moe."""

    definition_name = "trtllm_fp4_block_scale_routed_moe_topk8_e128_h2048_i768"


class TestTrtllmFp4BlockScaleRoutedMoeTopk8E64H4096I1536(ReferenceContract):
    """Held against every source of trtllm_fp4_block_scale_routed_moe."""

    definition_name = "trtllm_fp4_block_scale_routed_moe_topk8_e64_h4096_i1536"


class TestTrtllmFp8PerTensorScaleMoeTopk1E128H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp8_per_tensor_scale_moe_topk1."""

    definition_name = "trtllm_fp8_per_tensor_scale_moe_topk1_e128_h5120_i8192"


class TestTrtllmFp8PerTensorScaleMoeTopk1E16H5120I8192(ReferenceContract):
    """Held against every source of trtllm_fp8_per_tensor_scale_moe_topk1."""

    definition_name = "trtllm_fp8_per_tensor_scale_moe_topk1_e16_h5120_i8192"


class TestTrtllmFp8PerTensorScaleMoeTopk8E128H2048I768(ReferenceContract):
    """Held against every source of trtllm_fp8_per_tensor_scale_moe."""

    definition_name = "trtllm_fp8_per_tensor_scale_moe_topk8_e128_h2048_i768"

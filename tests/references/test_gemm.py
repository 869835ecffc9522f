"""Reference tests of op_type gemm; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestGemmN10240K8192(ReferenceContract):
    """gemm_n10240_k8192, held against every source of gemm."""

    definition_name = "gemm_n10240_k8192"


class TestGemmN128K2048(ReferenceContract):
    """gemm_n128_k2048, held against every source of gemm."""

    definition_name = "gemm_n128_k2048"


class TestGemmN16384K3072(ReferenceContract):
    """gemm_n16384_k3072, held against every source of gemm."""

    definition_name = "gemm_n16384_k3072"


class TestGemmN2048K4096(ReferenceContract):
    """gemm_n2048_k4096, held against every source of gemm."""

    definition_name = "gemm_n2048_k4096"


class TestGemmN2048K5376(ReferenceContract):
    """gemm_n2048_k5376, held against every source of gemm."""

    definition_name = "gemm_n2048_k5376"


class TestGemmN21504K5376(ReferenceContract):
    """gemm_n21504_k5376, held against every source of gemm."""

    definition_name = "gemm_n21504_k5376"


class TestGemmN256K3072(ReferenceContract):
    """gemm_n256_k3072, held against every source of gemm."""

    definition_name = "gemm_n256_k3072"


class TestGemmN256K7168(ReferenceContract):
    """gemm_n256_k7168, held against every source of gemm."""

    definition_name = "gemm_n256_k7168"


class TestGemmN28672K4096(ReferenceContract):
    """gemm_n28672_k4096, held against every source of gemm."""

    definition_name = "gemm_n28672_k4096"


class TestGemmN3072K3072(ReferenceContract):
    """gemm_n3072_k3072, held against every source of gemm."""

    definition_name = "gemm_n3072_k3072"


class TestGemmN3072K6144(ReferenceContract):
    """gemm_n3072_k6144, held against every source of gemm."""

    definition_name = "gemm_n3072_k6144"


class TestGemmN3072K8192(ReferenceContract):
    """gemm_n3072_k8192, held against every source of gemm."""

    definition_name = "gemm_n3072_k8192"


class TestGemmN34816K5120(ReferenceContract):
    """gemm_n34816_k5120, held against every source of gemm."""

    definition_name = "gemm_n34816_k5120"


class TestGemmN3584K18944(ReferenceContract):
    """gemm_n3584_k18944, held against every source of gemm."""

    definition_name = "gemm_n3584_k18944"


class TestGemmN3584K3584(ReferenceContract):
    """gemm_n3584_k3584, held against every source of gemm."""

    definition_name = "gemm_n3584_k3584"


class TestGemmN37888K3584(ReferenceContract):
    """gemm_n37888_k3584, held against every source of gemm."""

    definition_name = "gemm_n37888_k3584"


class TestGemmN4096K14336(ReferenceContract):
    """gemm_n4096_k14336, held against every source of gemm."""

    definition_name = "gemm_n4096_k14336"


class TestGemmN4096K4096(ReferenceContract):
    """gemm_n4096_k4096, held against every source of gemm."""

    definition_name = "gemm_n4096_k4096"


class TestGemmN4096K5376(ReferenceContract):
    """gemm_n4096_k5376, held against every source of gemm."""

    definition_name = "gemm_n4096_k5376"


class TestGemmN4608K3584(ReferenceContract):
    """gemm_n4608_k3584, held against every source of gemm."""

    definition_name = "gemm_n4608_k3584"


class TestGemmN5120K17408(ReferenceContract):
    """gemm_n5120_k17408, held against every source of gemm."""

    definition_name = "gemm_n5120_k17408"


class TestGemmN5120K2048(ReferenceContract):
    """gemm_n5120_k2048, held against every source of gemm."""

    definition_name = "gemm_n5120_k2048"


class TestGemmN5120K3072(ReferenceContract):
    """gemm_n5120_k3072, held against every source of gemm."""

    definition_name = "gemm_n5120_k3072"


class TestGemmN5120K5120(ReferenceContract):
    """gemm_n5120_k5120, held against every source of gemm."""

    definition_name = "gemm_n5120_k5120"


class TestGemmN5376K21504(ReferenceContract):
    """gemm_n5376_k21504, held against every source of gemm."""

    definition_name = "gemm_n5376_k21504"


class TestGemmN5376K4096(ReferenceContract):
    """gemm_n5376_k4096, held against every source of gemm."""

    definition_name = "gemm_n5376_k4096"


class TestGemmN57344K8192(ReferenceContract):
    """gemm_n57344_k8192, held against every source of gemm."""

    definition_name = "gemm_n57344_k8192"


class TestGemmN6144K4096(ReferenceContract):
    """gemm_n6144_k4096, held against every source of gemm."""

    definition_name = "gemm_n6144_k4096"


class TestGemmN7168K5120(ReferenceContract):
    """gemm_n7168_k5120, held against every source of gemm."""

    definition_name = "gemm_n7168_k5120"


class TestGemmN8192K28672(ReferenceContract):
    """gemm_n8192_k28672, held against every source of gemm."""

    definition_name = "gemm_n8192_k28672"


class TestGemmN8192K3072(ReferenceContract):
    """gemm_n8192_k3072, held against every source of gemm."""

    definition_name = "gemm_n8192_k3072"


class TestGemmN8192K8192(ReferenceContract):
    """gemm_n8192_k8192, held against every source of gemm."""

    definition_name = "gemm_n8192_k8192"

"""Reference tests of op_type rmsnorm; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestFusedAddRmsnormH2048(ReferenceContract):
    """fused_add_rmsnorm_h2048, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h2048"


class TestFusedAddRmsnormH3072(ReferenceContract):
    """fused_add_rmsnorm_h3072, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h3072"


class TestFusedAddRmsnormH4096(ReferenceContract):
    """fused_add_rmsnorm_h4096, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h4096"


class TestFusedAddRmsnormH5120(ReferenceContract):
    """fused_add_rmsnorm_h5120, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h5120"


class TestFusedAddRmsnormH5376(ReferenceContract):
    """fused_add_rmsnorm_h5376, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h5376"


class TestFusedAddRmsnormH7168(ReferenceContract):
    """fused_add_rmsnorm_h7168, held against every source of fused_add_rmsnorm."""

    definition_name = "fused_add_rmsnorm_h7168"


class TestRmsnormH128(ReferenceContract):
    """rmsnorm_h128, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h128"


class TestRmsnormH1536(ReferenceContract):
    """rmsnorm_h1536, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h1536"


class TestRmsnormH2048(ReferenceContract):
    """rmsnorm_h2048, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h2048"


class TestRmsnormH3072(ReferenceContract):
    """rmsnorm_h3072, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h3072"


class TestRmsnormH4096(ReferenceContract):
    """rmsnorm_h4096, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h4096"


class TestRmsnormH512(ReferenceContract):
    """rmsnorm_h512, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h512"


class TestRmsnormH5120(ReferenceContract):
    """rmsnorm_h5120, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h5120"


class TestRmsnormH5376(ReferenceContract):
    """rmsnorm_h5376, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h5376"


class TestRmsnormH7168(ReferenceContract):
    """rmsnorm_h7168, held against every source of rmsnorm."""

    definition_name = "rmsnorm_h7168"

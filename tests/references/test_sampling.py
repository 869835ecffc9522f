"""Reference tests of op_type sampling; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract


class TestTopKSamplingFromProbsV128256(ReferenceContract):
    """top_k_sampling_from_probs_v128256, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v128256"


class TestTopKSamplingFromProbsV129280(ReferenceContract):
    """top_k_sampling_from_probs_v129280, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v129280"


class TestTopKSamplingFromProbsV151936(ReferenceContract):
    """top_k_sampling_from_probs_v151936, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v151936"


class TestTopKSamplingFromProbsV152064(ReferenceContract):
    """top_k_sampling_from_probs_v152064, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v152064"


class TestTopKSamplingFromProbsV200064(ReferenceContract):
    """top_k_sampling_from_probs_v200064, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v200064"


class TestTopKSamplingFromProbsV202048(ReferenceContract):
    """top_k_sampling_from_probs_v202048, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v202048"


class TestTopKSamplingFromProbsV262208(ReferenceContract):
    """top_k_sampling_from_probs_v262208, held against every source of sampling."""

    definition_name = "top_k_sampling_from_probs_v262208"


class TestTopKTopPSamplingFromProbsV128256(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v128256, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v128256"


class TestTopKTopPSamplingFromProbsV129280(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v129280, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v129280"


class TestTopKTopPSamplingFromProbsV151936(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v151936, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v151936"


class TestTopKTopPSamplingFromProbsV152064(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v152064, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v152064"


class TestTopKTopPSamplingFromProbsV200064(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v200064, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v200064"


class TestTopKTopPSamplingFromProbsV202048(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v202048, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v202048"


class TestTopKTopPSamplingFromProbsV262208(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v262208, held against every source of sampling."""

    definition_name = "top_k_top_p_sampling_from_probs_v262208"


class TestTopPSamplingFromProbsV128256(ReferenceContract):
    """top_p_sampling_from_probs_v128256, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v128256"


class TestTopPSamplingFromProbsV129280(ReferenceContract):
    """top_p_sampling_from_probs_v129280, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v129280"


class TestTopPSamplingFromProbsV151936(ReferenceContract):
    """top_p_sampling_from_probs_v151936, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v151936"


class TestTopPSamplingFromProbsV152064(ReferenceContract):
    """top_p_sampling_from_probs_v152064, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v152064"


class TestTopPSamplingFromProbsV200064(ReferenceContract):
    """top_p_sampling_from_probs_v200064, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v200064"


class TestTopPSamplingFromProbsV202048(ReferenceContract):
    """top_p_sampling_from_probs_v202048, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v202048"


class TestTopPSamplingFromProbsV262208(ReferenceContract):
    """top_p_sampling_from_probs_v262208, held against every source of sampling."""

    definition_name = "top_p_sampling_from_probs_v262208"


class TestTopKSamplingFromProbsV1024(ReferenceContract):
    """top_k_sampling_from_probs_v1024, held against every source of top_k_sampling_from_probs."""

    definition_name = "top_k_sampling_from_probs_v1024"


class TestTopKTopPSamplingFromProbsV1024(ReferenceContract):
    """top_k_top_p_sampling_from_probs_v1024, held against every source of top_k_top_p_sampling_from_probs."""

    definition_name = "top_k_top_p_sampling_from_probs_v1024"


class TestTopPSamplingFromProbsV1024(ReferenceContract):
    """top_p_sampling_from_probs_v1024, held against every source of top_p_sampling_from_probs."""

    definition_name = "top_p_sampling_from_probs_v1024"

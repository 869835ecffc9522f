"""Which builder makes which input: by the definition's op_type and the field's names for inputs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from refgrid.proving.inputs import dsa, gdn, grouped, mamba, moe, norm, paged, plain, rope, sampling

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

    Builder = Callable[[Drawing, str], Value]


class Rule(NamedTuple):
    """Inputs whose op_type and name fit both globs are made by `build`.

    `of_workload`: it looks at the workload or at other inputs, so that even a tensor of constant shape is no weight.
    """

    op_type: str
    name: str
    build: Builder
    of_workload: bool = False


# The first rule that fits makes the input, and inputs are made in the order of their rules: builders look at those
# made before.
RULES: tuple[Rule, ...] = (
    Rule("dsa_paged", "sparse_indices", dsa.sparse_indices, of_workload=True),
    Rule("dsa_paged", "c*_cache", dsa.sparse_cache, of_workload=True),
    Rule("dsa_paged", "kpe_cache", dsa.sparse_cache, of_workload=True),
    Rule("dsa_paged", "seq_lens", dsa.seq_lens, of_workload=True),
    Rule("dsa_paged", "block_table", dsa.block_table, of_workload=True),
    Rule("dsa_paged", "k_index_cache_fp8", dsa.packed_keys, of_workload=True),
    Rule("dsa_paged", "q_index_fp8", dsa.fp8_numbers),
    Rule("gqa_grouped", "q_ranges", grouped.q_ranges, of_workload=True),
    Rule("gqa_grouped", "k_ranges", grouped.k_ranges, of_workload=True),
    Rule("gqa_grouped", "mask_types", grouped.mask_types, of_workload=True),
    Rule("gqa_grouped", "[kv]", grouped.keys, of_workload=True),
    Rule("mamba_ssu", "state_batch_indices", mamba.slots, of_workload=True),
    Rule("mamba_ssu", "state", mamba.states, of_workload=True),
    Rule("mamba_ssu", "A", mamba.rates, of_workload=True),
    Rule("mamba_ssu", "B", mamba.inflow),
    Rule("mamba_ssu", "C", mamba.readout),
    Rule("mamba_ssu", "D", mamba.skips, of_workload=True),
    Rule("mamba_ssu", "dt", mamba.steps),
    Rule("mamba_ssu", "dt_bias", mamba.biases, of_workload=True),
    Rule("rope", "positions", rope.positions, of_workload=True),
    Rule("rope", "cos_sin_cache", rope.cos_sin_cache, of_workload=True),
    Rule("*", "qo_indptr", paged.qo_indptr, of_workload=True),
    Rule("*", "kv_indptr", paged.kv_indptr, of_workload=True),
    Rule("*", "kv_indices", paged.kv_indices, of_workload=True),
    Rule("*", "kv_last_page_len", paged.kv_last_page_len, of_workload=True),
    Rule("*", "[kv]_cache", paged.paged_cache, of_workload=True),
    Rule("*", "ckv_cache", paged.paged_cache, of_workload=True),
    Rule("*", "kpe_cache", paged.paged_cache, of_workload=True),
    Rule("*", "B", plain.gemm_weight),
    Rule("moe", "routing_bias", moe.routing_bias),
    Rule("moe", "routing_logits", moe.routing_logits, of_workload=True),
    Rule("moe", "topk_ids", moe.topk_ids, of_workload=True),
    Rule("moe", "hidden_states", moe.hidden_states),
    Rule("moe", "hidden_states_scale", moe.hidden_states_scale),
    Rule("moe", "gemm[12]_weights", moe.weights),
    Rule("moe", "gemm[12]_weights_scale", moe.weights_scale),
    Rule("moe", "output1_scales_gate_scalar", moe.output1_scales_gate_scalar),
    Rule("moe", "output1_scales_scalar", moe.output1_scales_scalar),
    Rule("moe", "output2_scales_scalar", moe.output2_scales_scalar),
    Rule("gdn", "cu_seqlens", gdn.cu_seqlens, of_workload=True),
    Rule("gdn", "initial_state_indices", gdn.state_slots, of_workload=True),
    Rule("gdn", "intermediate_states_buffer", gdn.unwritten),
    Rule("gdn", "k", gdn.unit_keys),
    Rule("gdn", "A_log", gdn.decay_rates),
    Rule("gdn", "dt_bias", gdn.decay_bias),
    Rule("gdn", "a", gdn.decay_input),
    Rule("gdn", "b", gdn.beta_input),
    Rule("sampling", "probs", sampling.probs),
    Rule("sampling", "top_k", sampling.top_k),
    Rule("sampling", "top_p", sampling.top_p),
    Rule("rmsnorm", "hidden_states", norm.rows, of_workload=True),
    Rule("rmsnorm", "residual", norm.rows, of_workload=True),
    Rule("*", "*", plain.plain),
)


def rule_of(op_type: str, name: str) -> Rule:
    """The rule that makes an input."""
    return RULES[turn(op_type, name)]


def turn(op_type: str, name: str) -> int:
    """The place of the rule that makes an input."""
    fits = (fnmatchcase(op_type, rule.op_type) and fnmatchcase(name, rule.name) for rule in RULES)
    return next(place for place, fit in enumerate(fits) if fit)

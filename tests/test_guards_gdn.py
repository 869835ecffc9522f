"""Faults planted into the references of the gated delta rule: each must be a mismatch of the right output."""

from __future__ import annotations

import pytest
from guards import Fault, demand_caught, prove, published, size

DECODE = ("gdn_decode_qk4_v8_d128_k_last", "edge_b3")
MTP = ("gdn_mtp_qk4_v8_d128_k_last", "edge_b3_t2_p5")
PADDED = ("gdn_mtp_qk4_v8_d128_k_last", "edge_b3_t4_p3")
PREFILL = ("gdn_prefill_qk4_v8_d128_k_last", "edge_t257_s5")
SHORT = ("gdn_prefill_qk4_v8_d128_k_last", "edge_t1_s3")
LONG = ("gdn_prefill_qk8_v16_d128_k_last", "edge_t65_s1")

FAULTS = [
    Fault("scale off by 2 %", DECODE, "(scale or q.shape[-1] ** -0.5)", "q.shape[-1] ** -0.5 * 1.02", "output is off"),
    Fault("scale 0 taken as it is", DECODE, "(scale or q.shape[-1] ** -0.5)", "scale", "output is off"),
    Fault("no decay", DECODE, "state * log_g.exp()", "state * torch.ones_like(log_g)", "new_state is off"),
    Fault("decay without its rate", DECODE, "-A_log.float().exp() *", "-A_log.float() *", "new_state is off"),
    Fault("decay without its bias", DECODE, "a.float() + dt_bias.float()", "a.float()", "new_state is off"),
    Fault("relu for softplus", DECODE, "functional.softplus", "functional.relu", "new_state is off"),
    Fault("beta without its sigmoid", DECODE, "b.float().sigmoid()", "b.float()", "new_state is off"),
    Fault("beta rounded to bfloat16", DECODE, "b.float().sigmoid()", "b.sigmoid().float()", "new_state is off"),
    Fault("value not corrected by what is held", DECODE, "- (s @ k[..., None])[..., 0]", "", "new_state is off"),
    Fault("state not corrected", DECODE, "s.addcmul_(", "s.addcmul(", "new_state is off"),
    Fault(
        "rows and columns swapped",
        DECODE,
        "v[:, 0], state, log_g",
        "v[:, 0], state.mT.contiguous(), log_g",
        "output is off",
    ),
    Fault(
        "value heads take turns at the key heads",
        DECODE,
        "x.float().repeat_interleave(num_v_heads // x.shape[-2], dim=-2)",
        "torch.cat([x.float()] * (num_v_heads // x.shape[-2]), dim=-2)",
        "output is off",
    ),
    Fault("slots in order", MTP, "initial_state_indices[row].long()", "row", "output is off"),
    Fault("slots not updated", MTP, "final_state[slot] = state", "pass", "final_state is off"),
    Fault(
        "states of drafts not kept", MTP, "intermediate_states[row, t] = state", "pass", "intermediate_states is nan"
    ),
    Fault(
        "states of drafts in the row of the slot",
        MTP,
        "intermediate_states[row, t] = state",
        "intermediate_states[slot, t] = state",
        "intermediate_states is",
    ),
    Fault(
        "padding taken for the last slot",
        PADDED,
        "initial_state_indices >= 0",
        "initial_state_indices >= -1",
        "output is off",
    ),
    Fault(
        "padding left unwritten", PADDED, "torch.zeros_like(v), initial", "torch.ones_like(v), initial", "output is off"
    ),
    Fault("state not carried between chunks", PREFILL, "p[..., -1:, :] * state +", "", "new_state is off"),
    Fault("state carried without decay", PREFILL, "p[..., -1:, :] * state +", "state +", "new_state is off"),
    Fault("old state not read", PREFILL, "o = p * (q @ state.mT) +", "o =", "output is off"),
    Fault("corrections do not see each other", PREFILL, "system = beta", "system = 0 * beta", "output is off"),
    Fault("a token's own correction unseen", PREFILL, "(r * (q @ k.mT))", "(r * (q @ k.mT)).tril(-1)", "output is off"),
    Fault("chunks of 64 that step by 65", LONG, "default=0), CHUNK)", "default=0), CHUNK + 1)", "new_state is off"),
    Fault("tokens beyond the end decay the state", PREFILL, "* inside[..., None]", "", "new_state is off"),
    Fault(
        "state of a sequence without tokens cleared", SHORT, "state.clone()", "torch.zeros_like(state)", "new_state is"
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(fault: Fault) -> None:
    demand_caught(published(), fault)


@pytest.mark.parametrize("where", [DECODE, MTP, PADDED, PREFILL, SHORT, LONG], ids="-".join)
def test_the_unchanged_reference_matches_there_and_a_laptop_proves_it(where: tuple[str, str]) -> None:
    prove(published(), where)

    assert size(published(), where) == "small"

"""Faults planted into the references of state updates and rotary embeddings: each must be a mismatch of its output."""

from __future__ import annotations

import pytest
from guards import Fault, demand_caught, prove, published, size

MAMBA = ("mamba_ssu_decode_h64_d64_s128_ng4", "edge_b2_c2")
PADDED = ("mamba_ssu_decode_h64_d64_s128_ng4", "edge_b4_c5_pad")
CHANNELS = ("mamba_ssu_decode_h64_d64_s128_ng4", "edge_b3_c3_channels")
ROPE = ("rope_with_cos_sin_cache_neox_style_d128_rd64", "edge_t17_q24_k4_s1025")
FEW = ("rope_with_cos_sin_cache_neox_style_d128_rd64", "edge_t2_q5_k1_s7")

MOVED = "output[row], new_state[slot] = y.to(x.dtype), s.to(state.dtype)"
SPREAD = "each.repeat_interleave(x.shape[1] // each.shape[1], dim=1)"
INFLOW = "(dt * x)[..., None] * b[:, :, None]"
HALVES = """\
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    y = x.clone()
    y[..., :half] = a * cos - b * sin
    y[..., half : 2 * half] = b * cos + a * sin
"""
NEIGHBOURS = HALVES.replace(":half]", ": 2 * half : 2]").replace("half : 2 * half]", "1 : 2 * half : 2]")
WHOLE = "half, cos, sin = x.shape[-1] // 2, *(t.repeat(1, 1, x.shape[-1] // 2 // t.shape[-1]) for t in (cos, sin))"

FAULTS = [
    Fault("decay that grows", MAMBA, "(dt[..., None] * A)", "(dt[..., None] * -A)", "output is"),
    Fault("no decay", MAMBA, "(dt[..., None] * A)", "(0 * dt[..., None] * A)", "output is off"),
    Fault("no softplus", MAMBA, "torch.nn.functional.softplus(dt + dt_bias)", "dt + dt_bias", "output is"),
    Fault("relu for softplus", MAMBA, "functional.softplus(", "functional.relu(", "output is off"),
    Fault("no bias of the step", MAMBA, "softplus(dt + dt_bias)", "softplus(dt)", "output is off"),
    Fault("nothing of the input directly", MAMBA, "+ D * x, s", ", s", "output is off"),
    Fault("B and C swapped", MAMBA, "for each in (x, dt, B, C)]", "for each in (x, dt, C, B)]", "output is off"),
    Fault("groups one head off", MAMBA, ", dim=1) for each in", ", dim=1).roll(1, 1) for each in", "output is off"),
    Fault("heads take turns at the groups", MAMBA, SPREAD, "each.repeat(1, x.shape[1] // each.shape[1], 1)", "output"),
    Fault("input without its step", MAMBA, "(dt * x)[..., None]", "x[..., None]", "output is off"),
    Fault("token unseen by its own output", MAMBA, "(s * c", f"((s - {INFLOW}) * c", "output is off"),
    Fault("state not updated", MAMBA, MOVED, "output[row] = y.to(x.dtype)", "new_state is off"),
    Fault("states of the slots in order", PADDED, "update(state[slot]", "update(state[row]", "output is"),
    Fault("states updated at the place in the batch", PADDED, "new_state[slot] =", "new_state[row] =", "new_state is"),
    Fault("padding taken for the last slot", PADDED, "indices >= 0)", "indices >= -1)", "output is"),
    Fault("output of padding left unwritten", PADDED, "torch.zeros_like(x)", "torch.ones_like(x)", "output is off"),
    Fault("one rate for all channels", CHANNELS, "token, A,", "token, A[:, :1].expand_as(A),", "output is off"),
    Fault("one step for all channels", CHANNELS, "softplus(dt + dt_bias)", "softplus(dt + dt_bias)[..., :1]", "output"),
    Fault("neighbours for halves", ROPE, HALVES, NEIGHBOURS, "q_out is off"),
    Fault("turned backwards", ROPE, "rotate_halves(q, cos, sin)", "rotate_halves(q, cos, -sin)", "q_out is off"),
    Fault("sine's sign in one of the sums", ROPE, "a * cos - b * sin", "a * cos + b * sin", "q_out is off"),
    Fault("sines before cosines", ROPE, "cos, sin = cos_sin", "sin, cos = cos_sin", "q_out is off"),
    Fault("positions one off", ROPE, "cos_sin_cache[positions]", "cos_sin_cache[positions - 1]", "q_out is"),
    Fault("positions one off among few", FEW, "cache[positions]", "cache[positions - 1]", "q_out is"),
    Fault("all of the head rotated", ROPE, "half = cos.shape[-1]", WHOLE, "q_out is off"),
    Fault("keys not rotated", ROPE, "rotate_halves(k, cos, sin)", "k.clone()", "k_out is off"),
    Fault("second half from the turned first", ROPE, "+ a * sin", "+ y[..., :half].float() * sin", "q_out is off"),
    Fault("the rest cleared", ROPE, "y = x.clone()", "y = torch.zeros_like(x)", "q_out is off"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(fault: Fault) -> None:
    demand_caught(published(), fault)


@pytest.mark.parametrize("where", [MAMBA, PADDED, CHANNELS, ROPE, FEW], ids="-".join)
def test_the_unchanged_reference_matches_there_and_a_laptop_proves_it(where: tuple[str, str]) -> None:
    prove(published(), where)

    assert size(published(), where) == "small"

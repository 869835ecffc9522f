"""mxfp4: float32 numbers that it holds exactly, to its codes and scales and back. Nothing is rounded.

A code is an e2m1 number in 4 bits, two in a byte, the first in the lower half. 32 numbers along the last axis share a
scale, a power of two stored as ue8m0: its exponent plus 127 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import torch

from refgrid_groundtruth import Unavailable

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
_BIAS, _LARGEST_EXPONENT = 127, 2  # of ue8m0; of e2m1: 4 and 6 are 2**2 and more
_LEAST, _MOST = -126, 124  # exponents of scales for which all numbers of the block are normal float32


def pack_mxfp4(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """numbers [..., n] float32 -> codes [..., n / 2] uint8, scales [..., n / 32] uint8.

    The scale is the one that quantisers choose: the largest number of a block becomes 4 or 6. Zeros alone have scale 1.
    Raises Unavailable("unsupported") for a number that mxfp4 does not hold.
    """
    if numbers.shape[-1] % BLOCK:
        raise Unavailable("unsupported", f"rows of {numbers.shape[-1]} are no multiple of mxfp4's blocks of {BLOCK}")
    codes = numbers.new_empty((*numbers.shape[:-1], numbers.shape[-1] // 2), dtype=torch.uint8)
    scales = numbers.new_empty((*numbers.shape[:-1], numbers.shape[-1] // BLOCK), dtype=torch.uint8)
    if numbers.ndim > 2:  # matrix by matrix: what is needed between is several times as large
        for matrix, (code, scale) in zip(numbers, zip(codes, scales, strict=True), strict=True):
            code[...], scale[...] = pack_mxfp4(matrix)
        return codes, scales
    blocks = numbers.unflatten(-1, (-1, BLOCK))
    exponent = _exponents(blocks)
    code = _codes(torch.ldexp(blocks, -exponent[..., None]), blocks)
    codes[...] = (code[..., ::2] | code[..., 1::2] << 4).flatten(-2)
    scales[...] = (exponent + _BIAS).to(torch.uint8)
    return codes, scales


def unpack_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes [..., n / 2], scales [..., n / 32] uint8 -> numbers [..., n] float32."""
    table = torch.tensor((*E2M1, *(-number for number in E2M1)), device=codes.device)
    code = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    blocks = table[code.int()].unflatten(-1, (-1, BLOCK))
    return torch.ldexp(blocks, scales.int()[..., None] - _BIAS).flatten(-2)


def _exponents(blocks: torch.Tensor) -> torch.Tensor:
    """Exponents of the scales: those of the largest numbers, less e2m1's largest; 0 for a block of zeros."""
    largest = blocks.abs().amax(dim=-1)
    if not largest.isfinite().all():
        raise Unavailable("unsupported", "a number is not finite, which mxfp4 does not hold")
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT, 0)
    beyond = (exponent < _LEAST) | (exponent > _MOST)
    if beyond.any():
        value = largest[beyond][0].item()
        raise Unavailable("unsupported", f"{value:.6g} needs a scale outside 2**{_LEAST} to 2**{_MOST}")
    return exponent


def _codes(scaled: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Codes of numbers over their scale; `blocks` are the numbers themselves, to name the one that has none."""
    table = torch.tensor(E2M1, device=scaled.device)
    code = torch.searchsorted(table, scaled.abs()).clamp(max=len(E2M1) - 1)
    off = table[code] != scaled.abs()
    if off.any():
        value, at = blocks[off][0].item(), tuple(off.nonzero()[0].tolist())
        raise Unavailable(
            "unsupported", f"{value:.6g} at block and place {at} is no number of mxfp4 beside its block's"
        )
    return (code | torch.signbit(scaled).int() << 3).to(torch.uint8)

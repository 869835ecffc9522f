"""mxfp4 is packed and unpacked without loss, in the form that libraries read, and refuses what it cannot hold."""

from __future__ import annotations

import math

import pytest
import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.quantised import BLOCK, E2M1, pack_mxfp4, unpack_mxfp4


def numbers(*shape: int, spread: int = 3) -> torch.Tensor:
    """e2m1 numbers of either sign, times a power of two for each block."""
    generator = torch.Generator().manual_seed(sum(shape))
    blocks = (*shape[:-1], shape[-1] // BLOCK, BLOCK)
    code = torch.randint(8, blocks, generator=generator)
    sign = 1.0 - 2.0 * torch.randint(2, blocks, generator=generator)
    power = 2.0 ** torch.randint(-spread, spread + 1, (*blocks[:-1], 1), generator=generator)
    return (torch.tensor(E2M1)[code] * sign * power).flatten(-2)


@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 96), (2, 3, 4, 32), (0, 32), (2, 0, 32)])
def test_there_and_back_nothing_changes_not_even_the_sign_of_zero(shape: tuple[int, ...]) -> None:
    given = numbers(*shape)

    codes, scales = pack_mxfp4(given)
    back = unpack_mxfp4(codes, scales)

    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.uint8)
    assert codes.shape == (*shape[:-1], shape[-1] // 2)
    assert scales.shape == (*shape[:-1], shape[-1] // 32)
    assert torch.equal(back, given)
    assert torch.equal(back.signbit(), given.signbit())


def test_codes_and_scales_by_hand() -> None:
    row = torch.zeros(64)
    row[:4] = torch.tensor([6.0, -0.5, 1.5, -4.0])  # codes 7, 9, 3, 14 at scale 1
    row[32], row[63] = 0.75, -0.125  # times 8: 6 and -1, codes 7 and 10

    codes, scales = pack_mxfp4(row)

    assert codes[:2].tolist() == [0x97, 0xE3]
    assert codes[16].item() == 0x07
    assert codes[31].item() == 0xA0
    assert scales.tolist() == [127, 124]


@pytest.mark.parametrize("largest", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
def test_a_block_of_any_largest_number_keeps_its_small_ones(largest: float) -> None:
    block = torch.tensor([value for value in E2M1 if value <= largest]).repeat(BLOCK)[:BLOCK] * 2.0**-9

    codes, scales = pack_mxfp4(block)

    assert torch.equal(unpack_mxfp4(codes, scales), block)
    assert block.max() / 2.0 ** (scales.item() - 127) in (4.0, 6.0)


def test_zeros_have_scale_one() -> None:
    codes, scales = pack_mxfp4(torch.zeros(1, 64))

    assert not codes.any()
    assert scales.tolist() == [[127, 127]]


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (3, 0.7, "0.7 at block and place"),  # no e2m1 number
        (35, 5.0, "5 at block and place"),
        (35, 0.25, "0.25 at block and place"),  # half the least step of a block with a 6
        (40, math.inf, "not finite"),
        (40, math.nan, "not finite"),
        (40, 2.0**-130, "needs a scale"),
    ],
)
def test_what_mxfp4_does_not_hold_is_refused(place: int, value: float, told: str) -> None:
    row = torch.zeros(1, 64)
    row[0, 32] = 0.0 if told == "needs a scale" else 6.0
    row[0, place] = value

    with pytest.raises(Unavailable, match=told) as caught:
        pack_mxfp4(row)

    assert caught.value.verdict == "unsupported"


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(Unavailable, match="rows of 48"):
        pack_mxfp4(torch.zeros(2, 48))


def test_it_leaves_its_input() -> None:
    given = numbers(2, 3, 64)
    before = given.clone()

    pack_mxfp4(given)

    assert torch.equal(given, before)

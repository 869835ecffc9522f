"""Inputs of mixtures of experts: routing without near-ties, quantised weights that a kernel can take as they are.

A workload's uuid may ask for a routing: `one_expert` in it sends every token to one and the same expert among others,
`elsewhere` sends none to an expert that is here, `negative` makes all logits negative.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from refgrid.proving.inputs import normal, plain

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

FP8_STD = 100.0  # 4.3 standard deviations, the largest that is drawn, are then just below e4m3's largest number, 448
INTERMEDIATE = 8.0  # what GEMM2's input is multiplied with before a kernel rounds it to e4m3: it reaches about 50
GEMM2_GAIN = 2.0  # so that the mean of several experts is of the order of 1 too

MXFP4_BLOCK = 32
# Blocks after which an mxfp4 weight repeats itself: whole ones, so that none has numbers of two scales, and a prime, so
# that rows of one length are distinct shifts of each other.
MXFP4_PERIOD = 2**19 - 1
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

_GRID = 4096  # DeepSeek's biased scores are multiples of 1 / _GRID, drawn apart by more than sigmoids differ
_BIAS_STEP = 256  # its biases are multiples of 1 / _BIAS_STEP, which a bfloat16 holds
_BIAS_MOST = 12


def routing_bias(drawing: Drawing, name: str) -> Value:
    """DeepSeek's is small, so that it does not choose alone; Llama's, which is not used, is large: use would show."""
    most, step = (_BIAS_MOST, _BIAS_STEP) if _is_deepseek(drawing) else (127, 16)
    drawn = torch.randint(-most, most + 1, drawing.shape(name), generator=drawing.generator(name))
    return drawing.place(name, (drawn.double() / step).to(drawing.float_dtype(name)))


def routing_logits(drawing: Drawing, name: str) -> Value:
    """Every row a permutation of numbers well apart, a third of the rows all negative; one expert is always last."""
    return drawing.place(name, (_deepseek if _is_deepseek(drawing) else _spaced)(drawing, name))


def topk_ids(drawing: Drawing, name: str) -> Value:
    """expert << 16 | bits of its weight: distinct experts in no order, bfloat16 weights of sum a little below one."""
    (tokens, top_k), generator = drawing.shape(name), drawing.generator(name)
    experts = drawing.axis(name, "num_experts")
    rank = _wish(drawing, name, experts, generator).ranks(tokens, experts, generator)
    best = rank.argsort(dim=1, descending=True)[:, :top_k]
    expert = best.gather(1, _shuffled(tokens, top_k, generator))
    part = torch.randint(1, 17, (tokens, top_k), generator=generator)
    spare = torch.randint(9, (tokens, 1), generator=generator)  # a kernel that makes the sum one is seen
    weight = (part.float() / (part.sum(dim=1, keepdim=True) + spare)).bfloat16()
    return drawing.place(name, (expert << 16 | weight.view(torch.int16).long() & 0xFFFF).to(torch.int32))


def hidden_states(drawing: Drawing, name: str) -> Value:
    """Standard normal numbers, in fp8 over most of its range: hidden_states_scale brings them back."""
    return plain.normal_tensor(drawing, name, FP8_STD if drawing.dtype(name).itemsize == 1 else 1.0)


def weights(drawing: Drawing, name: str) -> Value:
    """fp8 numbers, or float32 numbers that mxfp4 holds: e2m1 times a power of two for 32 along the input."""
    if drawing.dtype(name).itemsize == 1:
        return plain.normal_tensor(drawing, name, FP8_STD)
    shape = drawing.shape(name)
    if shape[-1] % MXFP4_BLOCK:
        raise drawing.error(name, f"has rows of {shape[-1]}, which is no multiple of {MXFP4_BLOCK}")
    blocks = math.prod(shape) // MXFP4_BLOCK
    drawn = _mxfp4(min(blocks, MXFP4_PERIOD), drawing.generator(name)) * _weight_size(drawing, name) / 2
    if blocks > MXFP4_PERIOD:
        return plain.repeated(drawing, name, drawn)
    return drawing.place(name, drawn.reshape(shape))


def hidden_states_scale(drawing: Drawing, name: str) -> Value:
    """One a token and 128 of its values, so that they are of the order of 1."""
    return drawing.place(name, _scales(drawing, name, 1 / 128))


def weights_scale(drawing: Drawing, name: str) -> Value:
    """One a block of 128 x 128, so that outputs are of the order of 1."""
    return drawing.place(name, _scales(drawing, name, _weight_size(drawing, name) / 128))


def output1_scales_gate_scalar(drawing: Drawing, name: str) -> Value:
    """Scale of the input times that of an expert's first weight."""
    return drawing.place(name, _scales(drawing, name, _weight_size(drawing, "gemm1_weights") / 64 / 128))


def output1_scales_scalar(drawing: Drawing, name: str) -> Value:
    """The gate's, times what the intermediate is multiplied with to fill the range of fp8."""
    gate = drawing.values["output1_scales_gate_scalar"]
    assert isinstance(gate, torch.Tensor), "the definition gives it a shape"
    return drawing.place(name, gate.cpu() * INTERMEDIATE)


def output2_scales_scalar(drawing: Drawing, name: str) -> Value:
    """Scale of an expert's second weight, and the intermediate's taken back."""
    return drawing.place(name, _scales(drawing, name, _weight_size(drawing, "gemm2_weights") / 128 / INTERMEDIATE))


def _is_deepseek(drawing: Drawing) -> bool:
    return "routed_scaling_factor" in drawing.definition.inputs


def _weight_size(drawing: Drawing, name: str) -> float:
    """About 1 / sqrt(columns), a power of two, of the weight that `name` or its scale belongs to."""
    gain, wide = (1.0, "hidden_size") if name.startswith("gemm1") else (GEMM2_GAIN, "intermediate_size")
    return gain * 2.0 ** -(drawing.axis(name, wide).bit_length() // 2)


def _scales(drawing: Drawing, name: str, size: float) -> torch.Tensor:
    """Positive, of mean 1.5 * size, a factor of three between the least and the largest; size is a power of two."""
    drawn = torch.randint(48, 144, drawing.shape(name), generator=drawing.generator(name))
    return (drawn.double() / 64 * size).to(drawing.float_dtype(name))


def _mxfp4(blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks of e2m1 numbers of standard deviation about 2.2, times 1/2, 1 or 2: [blocks * MXFP4_BLOCK] float32."""
    middles = (_E2M1[1:] + _E2M1[:-1]) / 2
    scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (blocks, 1), generator=generator)]
    drawn, start = torch.empty(blocks, MXFP4_BLOCK), 0
    for part in normal.normal_numbers(blocks * MXFP4_BLOCK, torch.bfloat16, generator, scale=2.2):
        numbers = part.float().view(-1, MXFP4_BLOCK)
        rows = slice(start, start + len(numbers))
        drawn[rows] = _E2M1[torch.bucketize(numbers.abs(), middles)].copysign(numbers) * scale[rows]
        start = rows.stop
    return drawn.flatten()


def _spaced(drawing: Drawing, name: str) -> torch.Tensor:
    """Multiples of a step that any 8-bit mantissa holds; the largest of a row lies between -1 and 4.

    Not below: its sigmoid is a weight, and twice in a product where it multiplies the input.
    """
    (tokens, experts), generator = drawing.shape(name), drawing.generator(name)
    rank = _wish(drawing, name, experts, generator).ranks(tokens, experts, generator)
    least = experts if "negative" in drawing.workload.uuid else experts // 2
    shift = torch.randint(least, experts + experts // 16 + 1, (tokens, 1), generator=generator)
    wanted = (rank - shift).double() * 8 / 2 ** (experts - 1).bit_length()
    logits = wanted.to(drawing.float_dtype(name))
    if not torch.equal(logits.double(), wanted):
        raise drawing.error(name, f"are {experts} numbers well apart, which {logits.dtype} cannot hold")
    return logits


def _deepseek(drawing: Drawing, name: str) -> torch.Tensor:
    """Logits for which sigmoid + bias are multiples of 1 / _GRID, all of a row apart, and no groups tie at the cut."""
    (tokens, experts), generator = drawing.shape(name), drawing.generator(name)
    bias = drawing.values["routing_bias"]
    assert isinstance(bias, torch.Tensor), "the definition gives it a shape"
    rank = _untied(drawing, name, tokens, experts, generator)
    negative = torch.randint(3, (tokens, 1), generator=generator) == 0
    if "negative" in drawing.workload.uuid:
        negative.fill_(True)
    # between 256 and 1792 a score is below a half, whatever the bias
    biased = torch.where(negative, 256 + rank * (1536 // experts), 384 + rank * (3072 // experts))
    score = biased - (bias.cpu().double() * _GRID).round().long()
    logit = [0.0, *(round(math.log(n / (_GRID - n)), 6) for n in range(1, _GRID))]
    return torch.tensor(logit, dtype=torch.float64)[score].to(drawing.float_dtype(name))


def _untied(drawing: Drawing, name: str, tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Ranks whose groups, each of the sum of its two best, do not tie where some are left out; drawn again until so."""
    groups, kept = (int(drawing.definition.constant(each)) for each in ("n_group", "topk_group"))
    wish = _wish(drawing, name, experts, generator)
    rank = wish.ranks(tokens, experts, generator)
    while kept < groups:
        best = rank.view(tokens, groups, -1).topk(2, dim=2).values.sum(dim=2).sort(dim=1, descending=True).values
        tied = best[:, kept - 1] == best[:, kept]
        if not tied.any():
            break
        rank[tied] = wish.ranks(tokens, experts, generator)[tied]
    return rank


class _Wish(NamedTuple):
    """What a workload's routing should hold besides chance: here = [first, end), all rows' last and perhaps best."""

    first: int
    end: int
    last: int
    best: int | None
    elsewhere: bool

    def ranks(self, tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
        """Every row a permutation of the experts' ranks, the largest the best: [tokens, experts] int64.

        The first row's best is the first expert that is here, the second row's the last, so that small workloads have
        an output and both ends of the weights are used. A favoured expert's neighbour comes second where it can, so
        that their group stays in.
        """
        rank = _shuffled(tokens, experts, generator)
        _swap(rank, self.last, 0)
        if self.elsewhere:
            rank[:, self.first : self.end] -= experts
            return rank.argsort(dim=1).argsort(dim=1)
        favours = [(rank, self.best)] if self.best is not None else [(rank[:1], self.first), (rank[1:2], self.end - 1)]
        for rows, expert in favours:
            _swap(rows, expert, experts - 1)
            if expert ^ 1 < experts:
                _swap(rows, expert ^ 1, experts - 2)
        return rank


def _wish(drawing: Drawing, name: str, experts: int, generator: torch.Generator) -> _Wish:
    offset, uuid = drawing.workload.inputs.get("local_expert_offset"), drawing.workload.uuid
    first = int(offset.value or 0) if offset is not None else 0
    end = first + drawing.axes.get("num_local_experts", experts)
    if not 0 <= first < end <= experts:
        raise drawing.error(name, f"are those of {experts} experts, of which [{first}, {end}) cannot be here")
    last, best = (int(torch.randint(*bounds, (1,), generator=generator)) for bounds in ((0, experts), (first, end)))
    return _Wish(first, end, last, best if "one_expert" in uuid else None, "elsewhere" in uuid)


def _swap(rank: torch.Tensor, expert: int, place: int) -> None:
    """Give the expert that place in every row, and its place to whoever had it."""
    row, holder = torch.arange(len(rank)), (rank == place).long().argmax(dim=1)
    rank[row, holder] = rank[:, expert].clone()
    rank[:, expert] = place


def _shuffled(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Each row a permutation of range(width): [rows, width] int64."""
    return torch.empty(rows, width, dtype=torch.int64).random_(generator=generator).argsort(dim=1, stable=True)

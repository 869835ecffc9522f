"""Top-k (Fan et al. 2018, arXiv 1805.04833) and top-p (Holtzman et al. 2019, arXiv 1904.09751) sampling, a token a row.

As flashinfer.sampling. A filter keeps the probabilities at or above a row's threshold, so equal ones are kept or
dropped together. The thresholds are found by radix selection: no row is sorted.
"""

import torch

from refgrid_references.blocks import block_elements

RADIX_BITS = 10  # of each of the three digits of a float32 from 0 to 1, whose first two bits are 0


def top_k_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """One token of each row, drawn from its top_k most probable ones.

    probs [batch_size, vocab_size] float32, rows sum to 1; top_k [batch_size] int32, below 1 or from vocab_size on: no
    filter -> samples [batch_size] int64. What ties with the last token kept is kept.
    """
    return sample(probs, top_k, None)


def top_p_sampling_from_probs(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """One token of each row, drawn from its nucleus: the most probable ones up to the one that reaches top_p.

    probs [batch_size, vocab_size] float32, rows sum to 1; top_p [batch_size] float32, from 1 on: no filter, up to 0:
    the most probable token -> samples [batch_size] int64. What ties with the last token kept is kept.
    """
    return sample(probs, None, top_p)


def top_k_top_p_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """One token of each row, drawn from the nucleus of its top_k most probable ones, whose mass counts as 1.

    probs [batch_size, vocab_size] float32; top_k [batch_size] int32 and top_p [batch_size] float32 as for the single
    filters -> samples [batch_size] int64.
    """
    return sample(probs, top_k, top_p)


def sample(probs: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Filter and draw some rows at a time; the uniform numbers come from torch's generator, one a row in order.

    Masses are float64: in float32 the running sum of 262,208 numbers is off by more than the least of them.
    """
    u = torch.rand(probs.shape[0], 1, dtype=torch.float64, device=probs.device)
    rows = max(1, block_elements(probs.device) // max(probs.shape[1], 1 << RADIX_BITS))
    samples = [torch.empty(0, dtype=torch.int64, device=probs.device)]
    for first in range(0, probs.shape[0], rows):
        part = slice(first, first + rows)
        p = probs[part].float()
        mass = p.double()  # [rows, vocab_size], 0 where filtered
        if top_k is not None:
            mass.masked_fill_(p < top_k_threshold(p, top_k[part, None]), 0)
        if top_p is not None:
            mass.masked_fill_(p < top_p_threshold(p, mass, top_p[part, None]), 0)
        samples.append(draw(mass, u[part]))
    return torch.cat(samples)


def top_k_threshold(p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest probability: p [rows, vocab_size], top_k [rows, 1] -> [rows, 1]."""
    vocab_size = p.shape[1]
    k = torch.where((top_k < 1) | (top_k > vocab_size), vocab_size, top_k)
    return reaching(p, None, k)


def top_p_threshold(p: torch.Tensor, mass: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The probability at which the mass of a row, from the largest one down, reaches top_p of the whole.

    p [rows, vocab_size] float32; mass alike, float64; top_p [rows, 1] -> [rows, 1].
    """
    bound = top_p.double() * mass.sum(dim=1, keepdim=True)
    bound = bound.clamp(min=torch.finfo(torch.float64).tiny)  # top_p <= 0 is reached by the first token
    return torch.where(top_p < 1, reaching(p, mass.flatten(), bound), 0)


def reaching(p: torch.Tensor, weights: torch.Tensor | None, bound: torch.Tensor) -> torch.Tensor:
    """The largest t for which the weights of all p >= t add up to `bound`; without weights each p weighs 1.

    p [rows, vocab_size] from 0 to 1, weights [rows * vocab_size], bound [rows, 1] -> [rows, 1]. The bits of such floats
    are in the order of their values, so t is found digit by digit.
    """
    digits = 1 << RADIX_BITS
    prefix = torch.zeros(p.shape[0], 1, dtype=torch.int32, device=p.device)  # the digits of t found so far
    for shift in (2 * RADIX_BITS, RADIX_BITS, 0):
        held = weigh(p, weights, prefix, shift)
        reached = held.cumsum(dim=1)
        at = (reached < bound).sum(dim=1, keepdim=True).clamp(max=digits - 1)
        bound = bound - (reached - held).gather(1, at)
        prefix = (prefix << RADIX_BITS) + (digits - 1 - at).int()
    return prefix.view(torch.float32)


def weigh(p: torch.Tensor, weights: torch.Tensor | None, prefix: torch.Tensor, shift: int) -> torch.Tensor:
    """The weight of the p that begin with `prefix`, by their next digit: [rows, digits], largest digit first.

    p, weights as in reaching, prefix [rows, 1] int32; `shift` bits follow the digit. All p of one digit have one
    exponent, so that their float64 sum is exact in any order: this is deterministic on a GPU too.
    """
    bins = 2 << RADIX_BITS
    held = torch.bincount(places(p, prefix, shift), weights, p.shape[0] * bins)
    return held.view(-1, bins)[:, : bins // 2].flip(1)


def places(p: torch.Tensor, prefix: torch.Tensor, shift: int) -> torch.Tensor:
    """Where each p is counted: a row has a bin for each digit, and as many again for what does not begin with `prefix`.

    That is spread by its digit too, as one bin for all of it would be added to one after the other. p, prefix and shift
    as in weigh -> [rows * vocab_size] int32.
    """
    digits = 1 << RADIX_BITS
    place = (p.view(torch.int32) >> shift).bitwise_and_((1 << 31 - shift) - 1)  # without the sign that -0.0 has
    place.bitwise_xor_(prefix << RADIX_BITS)  # below `digits` where it begins with `prefix`
    for part in place.tensor_split(2, dim=1):  # one after the other, for half the memory
        torch.minimum(part, (part & (digits - 1)).add_(digits), out=part)
    row = torch.arange(p.shape[0], dtype=torch.int32, device=p.device)[:, None]
    return place.add_(row * 2 * digits).flatten()


def draw(mass: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse transform: the first token whose cumulated mass exceeds u of the whole, so never one of no mass.

    mass [rows, vocab_size] float64, is overwritten; u [rows, 1] float64 in [0, 1) -> [rows] int64.
    """
    reached = mass.cumsum_(dim=1)
    return torch.searchsorted(reached, u * reached[:, -1:], right=True)[:, 0]

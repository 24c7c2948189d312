"""Dropout bits from a counter: whether a feature is kept is a hash of what it is, not of when.

Knows tensors only; the reference implementation of the op `dropout_keep`.

    keep[t, f] = H(seed, adapter, input, epoch, sample_ids[t], positions[t], f) >= p

Nothing else enters, so the bit does not depend on packing, micro-batches, threads, device or on
what trains beside it, and backward draws it again instead of keeping it.

H in two stages, since only the second runs over all T * F elements:

1. per row, in 64 bits: splitmix64's finalizer (Steele et al. 2014, with Stafford's constants) is
   chained over the seven counters but the feature. Its halves are the row's offset a and its odd
   multiplier m. Per feature, likewise, a 32-bit key c.
2. per element, in 32 bits, wrapping: x = a + c; x = x ^ (x >> 15); x = x * m. The bit is kept
   where x, signed, is at least round(p * 2**32) - 2**31.

The shift is arithmetic, torch's only one for signed integers: it costs one bit of state, never a
visible one, because the product with m fills the top again. Without it x would be linear in c: two
rows whose multipliers are equal, or small multiples of each other, would repeat each other's bits,
shifted. Such pairs are rare, and the only thing that the two passes buy. All passes are vectorized
on a CPU and outrun torch's Bernoulli, which would also need its mask stored and gives other bits on
other devices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Elements per chunk on a CPU, so that the passes stay in the L2 cache."""
_DEVICE_CHUNK = 1 << 26
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_WORD = (1 << 64) - 1
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer of a floating dtype's size."""


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    for shift, factor in _MIX:
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return word


def _mix(words: Tensor) -> Tensor:
    """`_mix_int` on an int64 tensor, bit for bit: shifts are made logical by masking."""
    for shift, factor in _MIX:
        logical = (words >> shift) & ((1 << (64 - shift)) - 1)
        words = (words ^ logical) * _signed(factor)
    return words


def _chained(words: Tensor, counter: Tensor) -> Tensor:
    return _mix(words * _signed(_GOLDEN) + counter + 1)


def call_word(call: tuple[int, ...]) -> int:
    """The hash of the counters that all rows share, in [0, 2**64)."""
    word = 0
    for counter in call:
        word = _mix_int((word * _GOLDEN + counter + 1) & _WORD)
    return word


def row_words(call: tuple[int, ...], sample_ids: Tensor, positions: Tensor) -> Tensor:
    """int64 [T]: the first stage. Low half: the offset a; high half, made odd: the multiplier m."""
    start = sample_ids.new_full((), _signed(call_word(call)))
    return _chained(_chained(start, sample_ids), positions)


def row_halves(
    call: tuple[int, ...], sample_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The row's words as two int32 [T]: offset a and odd multiplier m."""
    rows = row_words(call, sample_ids, positions)
    return rows.to(torch.int32), ((rows >> 32) | 1).to(torch.int32)


@lru_cache(maxsize=64)
def column_words(features: int, device: torch.device) -> Tensor:
    """int32 [features]: the keys c."""
    counted = torch.arange(1, features + 1, device=device) * _signed(_GOLDEN)
    return _mix(counted).to(torch.int32)


def threshold(p: float) -> int:
    """The least x that is kept."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


@lru_cache(maxsize=64)
def threshold_word(p: float, device: torch.device) -> Tensor:
    """int32 []: `threshold` on a device."""
    return torch.tensor(threshold(p), dtype=torch.int32, device=device)


def rows_at_once(features: int, device: torch.device) -> int:
    """Rows per chunk of the second stage."""
    chunk = _CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    return max(1, chunk // max(1, features))


def kept(
    offset: Tensor, factor: Tensor, column: Tensor, least: Tensor, out: Tensor | None = None
) -> Tensor:
    """bool [T, F], the second stage, for int32 offset, factor and least [T] and column [F].

    `out` may be of any dtype: 0 and 1.
    """
    x = offset[:, None] + column
    x ^= x >> 15
    x *= factor[:, None]
    return torch.ge(x, least[:, None], out=out)


def dropped(x: Tensor, offset: Tensor, factor: Tensor, column: Tensor, least: Tensor) -> Tensor:
    """A new [T, F]: x with zeros where `kept` is false.

    The words that x is made of, as integers, times 0 or 1: exact for every value, infinities too,
    and vectorized on a CPU, where selecting by a bool is not.
    """
    word = _WORDS[x.element_size()]
    keep = torch.empty(x.shape, dtype=word, device=x.device)
    kept(offset, factor, column, least, out=keep)
    return keep.mul_(x.view(word)).view(x.dtype)


def dropout_keep(
    seed: int,
    epoch: int,
    adapter: int,
    input: int,
    sample_ids: Tensor,
    positions: Tensor,
    features: int,
    p: float,
) -> Tensor:
    """Which features of which rows are kept, each with probability 1 - p (to 2**-32).

    Args:
        seed, epoch, adapter, input: any ints; their low 64 bits count.
        sample_ids: int64 [T].
        positions: int64 [T], same device.
        features: F.
        p: probability of dropping, 0 <= p < 1.

    Returns:
        bool [T, F].
    """
    offset, factor = row_halves((seed, adapter, input, epoch), sample_ids, positions)
    column = column_words(features, offset.device)
    least = threshold_word(p, offset.device).expand(offset.numel())
    keep = torch.empty(offset.numel(), features, dtype=torch.bool, device=offset.device)
    step = rows_at_once(features, offset.device)
    for at in range(0, offset.numel(), step):
        rows = slice(at, at + step)
        kept(offset[rows], factor[rows], column, least[rows], out=keep[rows])
    return keep

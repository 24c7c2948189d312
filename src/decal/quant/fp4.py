"""FP4, the 4-bit float of bitsandbytes: a sign, two bits of exponent, one of mantissa.

Knows only its 16 values, in the order of their bit patterns, which is not the order of their size:
0, 1/16, 8, 12, 4, 6, 2, 3 and the same with a minus, all divided by 12. Pattern 8 is a second zero.
"""

from __future__ import annotations

from decal.quant.codebook import CodebookFormat

_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

FP4 = CodebookFormat(
    name="fp4", values=tuple(sign * value / 12 + 0.0 for sign in (1, -1) for value in _POSITIVE)
)

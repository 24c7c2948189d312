"""NF4 through the format's own interface: error, double quantization, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from decal.errors import QuantError
from decal.kernels import ops
from decal.kernels.stored import NESTED_BLOCK_SIZE
from decal.quant import FORMATS, Recipe, quant_format
from decal.quant.codebook import BLOCK_SIZES, _table, nested_map

NF4 = quant_format("nf4")
SHAPES = [(1, 1), (5, 3), (33, 77), (64, 192), (129, 1030)]
CPU = torch.device("cpu")


def test_the_registry_says_what_is_near() -> None:
    """Fails if unknown names fall back to a default."""
    assert {name: fmt.name for name, fmt in FORMATS.items()} == {name: name for name in FORMATS}
    with pytest.raises(QuantError, match="did you mean `nf4`"):
        quant_format("nf44")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double", [False, True])
def test_the_error_is_the_formats(shape: tuple[int, int], block_size: int, double: bool) -> None:
    """At most half the widest gap of the codebook (0.152) times the block's scale; with double
    quantization plus the scale's own error: the map's steps are at most 0.0141 of the largest
    deviation from the mean, half of that is lost. Fails if blocks do not straddle rows, the offset
    is dropped, or a scale belongs to the next block."""
    weight = torch.randn(shape) * 0.02
    recipe = Recipe(format="nf4", block_size=block_size, double=double)
    packed = NF4.quantize(weight, recipe)
    blocks = weight.flatten().split(block_size)
    scale = torch.cat([b.abs().max().expand(b.numel()) for b in blocks]).view(shape)
    slack = 0.0
    if double:
        scales = torch.stack([b.abs().max() for b in blocks])
        slack = 0.0071 * (scales - scales.mean()).abs().max().item()
    error = (NF4.dequantize(packed, torch.float32) - weight).abs()
    assert bool((error <= 0.15201 * scale + slack + 1e-8).all())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_as_announced(shape: tuple[int, int], double: bool) -> None:
    """An empty layer is built from `part_shapes` alone. Fails if one count rounds down."""
    recipe = Recipe(format="nf4", block_size=32, double=double)
    parts = NF4.quantize(torch.randn(shape), recipe).parts
    announced = NF4.part_shapes(shape, recipe)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == announced
    assert list(parts) == list(announced)


def test_a_weight_costs_4_127_bits() -> None:
    """4 + 8/64 + 32/(64*256) bits, and 4.5 without double. Fails if scales stay float32."""
    weight = torch.randn(256, 1024)
    bits = []
    for double in (True, False):
        packed = NF4.quantize(weight, Recipe(format="nf4", double=double))
        stored = [part for part in packed.parts.values() if part.ndim]
        bits.append(sum(part.nbytes for part in stored) * 8 / weight.numel())
    assert bits == [4 + 8 / 64 + 32 / (64 * 256), 4.5]


def test_nested_codes_follow_the_midpoint_rule() -> None:
    """Nearest entry of the map by its midpoints. Fails if the offset is added instead of
    subtracted, or nested blocks have another size."""
    weight = torch.randn(700, 640) * torch.rand(700, 1) * 0.1
    plain = NF4.quantize(weight, Recipe(format="nf4", double=False))
    double = NF4.quantize(weight, Recipe(format="nf4", double=True))
    absmax = plain.parts["absmax"]
    code, shifted = nested_map(CPU), absmax - double.parts["nested_offset"]
    middle = (code[1:] + code[:-1]) / 2
    for block, index, scale in zip(
        shifted.split(NESTED_BLOCK_SIZE),
        double.parts["absmax"].split(NESTED_BLOCK_SIZE),
        double.parts["nested_absmax"],
        strict=True,
    ):
        assert scale == block.abs().max()
        full = block.numel() == NESTED_BLOCK_SIZE
        scaled = block * (1 / scale) if full else block / scale
        assert torch.equal(index.long(), (scaled[:, None] > middle).sum(1))


def test_the_offset_is_the_exact_mean_rounded_once() -> None:
    """Fails if the mean is taken in float32: about half of these twenty come out other."""
    for _ in range(20):
        scales = torch.rand(3001, 1) + 0.1
        parts = NF4.quantize(scales.expand(-1, 32), Recipe(format="nf4", block_size=32)).parts
        exact = math.fsum(scales.view(-1).tolist()) / 3001
        assert parts["nested_offset"].item() == torch.tensor(exact, dtype=torch.float32).item()


def test_identical_scales_survive_double_quantization() -> None:
    """All scales equal: nothing is left after the offset, and it must not be divided by zero. Fails
    without the clamp of the nested scale."""
    weight = torch.full((4, 64), 0.25)
    packed = NF4.quantize(weight, Recipe(format="nf4"))
    assert torch.equal(NF4.dequantize(packed, torch.float32), weight)


def test_threads_do_not_change_bytes() -> None:
    """Fails if the offset is a float32 mean: its rounding depends on the number of threads."""
    weight = torch.randn(1024, 1100)
    packed = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed.append(NF4.quantize(weight, Recipe(format="nf4", block_size=32)).parts)
    torch.set_num_threads(before)
    for other in packed[1:]:
        assert all(torch.equal(part, other[key]) for key, part in packed[0].items())


def test_default_dtype_and_device_do_not_matter() -> None:
    """transformers sets both while it loads a model. Fails if a table is made without saying its
    dtype: midpoints rounded to bfloat16 give other codes."""
    weight, recipe = torch.randn(129, 640), Recipe(format="nf4")
    plain = NF4.quantize(weight, recipe)
    _table.cache_clear()
    nested_map.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            other = NF4.quantize(weight, recipe)
            back = NF4.dequantize(other, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(part, other.parts[key]) for key, part in plain.parts.items())
    assert torch.equal(back, NF4.dequantize(plain, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matmul_is_the_dequantized_weight(dtype: torch.dtype) -> None:
    """Fails if matmul_t uses the transpose, or the weight is rounded to bfloat16 for all dtypes."""
    packed = NF4.quantize(torch.randn(33, 77), Recipe(format="nf4"))
    weight = NF4.dequantize(packed, dtype)
    x, grad = torch.randn(2, 3, 77, dtype=dtype), torch.randn(2, 3, 33, dtype=dtype)
    assert torch.equal(NF4.matmul(x, packed), torch.nn.functional.linear(x, weight))
    assert torch.equal(NF4.matmul_t(grad, packed), grad @ weight)


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]), 64, r"2 values .* NaN or inf"),
        (torch.tensor([[1e300, 1.0]], dtype=torch.float64), 64, "1 values that are NaN or inf"),
        (torch.ones(2, 64, dtype=torch.int8), 64, "torch.int8"),
        (torch.ones(2, 2, 64), 64, r"two dimensions, this one is \[2, 2, 64\]"),
        (torch.ones(0, 64), 64, "two dimensions"),
        (torch.ones(2, 64), 48, "block size 48 is not one of 32, 64"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    weight: torch.Tensor, block_size: int, message: str
) -> None:
    """Fails if the check is left out: NaN would be stored as some code."""
    with pytest.raises(QuantError, match=message):
        NF4.quantize(weight, Recipe(format="nf4", block_size=block_size))


def test_the_first_bad_value_is_named() -> None:
    """Fails if rows and columns are exchanged."""
    weight = torch.zeros(3, 70, dtype=torch.bfloat16)
    weight[1, 69] = float("-inf")
    with pytest.raises(QuantError, match=r"-inf at \[1, 69\]"):
        NF4.quantize(weight, Recipe(format="nf4"))


def test_a_transposed_weight_is_read_in_logical_order() -> None:
    """Fails if storage order is quantized instead of rows."""
    weight = torch.randn(70, 33).T
    recipe = Recipe(format="nf4")
    ours, theirs = NF4.quantize(weight, recipe), NF4.quantize(weight.contiguous(), recipe)
    assert torch.equal(ours.parts["weight_packed"], theirs.parts["weight_packed"])


def test_the_dynamic_map_has_256_ascending_values() -> None:
    """Fails with a decade missing or doubled."""
    code = ops.dynamic_map()
    assert code.shape == (256,)
    assert bool((code[1:] > code[:-1]).all())
    assert code[-1] == 1
    assert 0 in code

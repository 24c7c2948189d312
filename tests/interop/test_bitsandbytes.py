"""Against real bitsandbytes on the CPU: the same bytes, the same checkpoint, no larger error."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from decal.errors import QuantError
from decal.kernels import ops
from decal.quant import Packed, Recipe, quant_format
from decal.quant.bnb import (
    bnb_shapes,
    describe_quantization,
    from_bnb,
    quantization_config,
    to_bnb,
)
from decal.quant.codebook import BLOCK_SIZES
from decal.quant.identity import identity
from decal.quant.linear import QuantLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = bnb.functional
pytestmark = pytest.mark.interop

NF4 = quant_format("nf4")
SHAPES = [(1, 1), (5, 3), (33, 77), (64, 192), (130, 4097), (257, 640)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAME = "model.layers.0.self_attn.q_proj"


def sample(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, a row of zeros, and outliers."""
    weight = torch.randn(shape) * 0.02 * (1 + torch.rand(shape[0], 1))
    weight.view(-1)[::97] *= 20
    if shape[0] > 2:
        weight[1] = 0
    return weight.to(dtype)


def plain_dequantize(codes: Tensor, absmax: Tensor, block_size: int, n: int) -> Tensor:
    """bitsandbytes' formula without its kernels, which are wrong where rows and blocks straddle:
    0.50.2 on a CPU starts a new block with every row."""
    flat = codes.view(-1).long()
    index = torch.stack([flat // 16, flat % 16], 1).view(-1)[:n]
    return F.get_4bit_type("nf4", device="cpu")[index] * absmax.repeat_interleave(block_size)[:n]


def test_the_codebooks_are_equal() -> None:
    """Bit for bit. Fails if one digit of a literal is lost, or a decade of the map is rounded in
    another order."""
    assert torch.equal(NF4.code(torch.device("cpu")), F.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(ops.dynamic_map(), F.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_and_scales_are_equal(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    """Bit for bit, and so is the dequantized weight. Fails with nibbles swapped, or an odd end
    padded with code 0."""
    weight = sample(shape, dtype)
    codes, state = F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    packed = NF4.quantize(weight, Recipe(format="nf4", block_size=block_size, double=False))
    assert torch.equal(packed.parts["weight_packed"], codes)
    assert torch.equal(packed.parts["absmax"], state.absmax)
    n = weight.numel()
    plain = plain_dequantize(codes, state.absmax, block_size, n).view(shape)
    assert torch.equal(NF4.dequantize(packed, torch.float32), plain)
    if shape[1] % block_size == 0:
        assert torch.equal(NF4.dequantize(packed, dtype), F.dequantize_4bit(codes, state))


@pytest.mark.parametrize("columns", [32, 31], ids=["full blocks", "short blocks"])
def test_values_on_the_midpoints_round_alike(columns: int) -> None:
    """Where one rounding decides: products of a scale and a midpoint, and their neighbours. Fails
    with full blocks divided instead of multiplied by the reciprocal, or short ones multiplied."""
    code = NF4.code(torch.device("cpu"))  # type: ignore[attr-defined]
    middle = (code[1:] + code[:-1]) / 2
    scales = torch.rand(200, 1) * 0.1 + 1e-3
    exact = scales * middle
    rows = torch.cat([scales, torch.nextafter(exact, scales), exact, scales], 1)[:, :columns]
    for row in rows.view(200, 1, columns):
        codes, _ = F.quantize_4bit(row, blocksize=32, quant_type="nf4")
        packed = NF4.quantize(row, Recipe(format="nf4", block_size=32, double=False))
        assert torch.equal(packed.parts["weight_packed"], codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_fp4_codes_are_equal(shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    """A codebook that does not ascend and holds two zeros. Fails if codes are not mapped back after
    sorting, or a literal is rounded otherwise."""
    fp4, weight = quant_format("fp4"), sample(shape, dtype)
    codes, state = F.quantize_4bit(weight, blocksize=block_size, quant_type="fp4")
    packed = fp4.quantize(weight, Recipe(format="fp4", block_size=block_size, double=False))
    assert torch.equal(fp4.code(torch.device("cpu")), state.code)  # type: ignore[attr-defined]
    assert torch.equal(packed.parts["weight_packed"], codes)
    assert torch.equal(packed.parts["absmax"], state.absmax)
    double = fp4.quantize(weight, Recipe(format="fp4", block_size=block_size))
    assert torch.equal(double.parts["weight_packed"], codes)
    if shape[1] % block_size == 0:
        assert torch.equal(fp4.dequantize(packed, dtype), F.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(64, 192), (257, 640), (512, 2048)])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_double_quantization_loses_no_more(shape: tuple[int, int], block_size: int) -> None:
    """Root mean square error of scales and weights, within 1e-4 of bitsandbytes' or below it: its
    kernels deviate from the midpoint rule in about one nested code of a thousand. Fails if the
    offset is dropped or nested blocks have another size."""
    weight = sample(shape, torch.float32)
    codes, state = F.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    packed = NF4.quantize(weight, Recipe(format="nf4", block_size=block_size))
    exact = F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")[1].absmax
    theirs = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = NF4.absmax(packed)  # type: ignore[attr-defined]
    assert torch.equal(packed.parts["weight_packed"], codes)
    assert (ours - exact).norm() <= (theirs - exact).norm() * (1 + 1e-4)
    plain = plain_dequantize(codes, theirs, block_size, weight.numel()).view(shape)
    error = (NF4.dequantize(packed, torch.float32) - weight).norm()
    assert error <= (plain - weight).norm() * (1 + 1e-4)


def bnb_layer(double: bool, block_size: int, dtype: torch.dtype, fmt: str = "nf4"):
    linear = torch.nn.Linear(640, 33, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        640, 33, compute_dtype=dtype, compress_statistics=double, quant_type=fmt
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=double,
        quant_type=fmt,
        blocksize=block_size,
    )
    layer.bias = linear.bias
    return layer.to("cpu")


def state_of(layer) -> dict[str, Tensor]:
    return {f"{NAME}.{key}": value for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_their_checkpoint_is_read(
    double: bool, block_size: int, dtype: torch.dtype, fmt: str
) -> None:
    """A Linear4bit's state dict gives their dequantized weight bit for bit; a layer made of it
    computes with it. Fails if the offset is not added, or nested scales are taken as scales."""
    layer = bnb_layer(double, block_size, dtype, fmt)
    packed = from_bnb(NAME, {**state_of(layer), "other.weight": torch.zeros(1)})
    assert packed.recipe == Recipe(format=fmt, block_size=block_size, double=double)
    assert (packed.shape, packed.dtype) == ((33, 640), dtype)
    theirs = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(quant_format(fmt).dequantize(packed, dtype), theirs)
    ours = QuantLinear(packed, layer.bias.detach(), dtype)
    x = torch.randn(2, 640, dtype=dtype)
    wanted = torch.nn.functional.linear(x, theirs) + layer.bias
    if dtype == torch.bfloat16:  # one rounding or two, and not of the weight without bf16 products
        torch.testing.assert_close(ours(x), wanted, rtol=2**-6, atol=2**-5)
    else:
        assert torch.equal(ours(x), wanted)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_checkpoint_is_read_by_them(double: bool, dtype: torch.dtype) -> None:
    """Through QuantState.from_dict and Params4bit.from_prequantized. Fails if a key is misspelt or
    the JSON lacks a field."""
    weight = sample((33, 640), dtype)
    packed = NF4.quantize(weight, Recipe(format="nf4", block_size=128, double=double))
    tensors = to_bnb(NAME, packed)
    prefix = f"{NAME}.weight"
    stats = {key[len(prefix) + 1 :]: v for key, v in tensors.items() if key != prefix}
    state = F.QuantState.from_dict(dict(stats), device=torch.device("cpu"))
    theirs = F.dequantize_4bit(tensors[prefix], state)
    assert torch.equal(theirs, NF4.dequantize(packed, dtype))
    param = bnb.nn.Params4bit.from_prequantized(tensors[prefix], dict(stats), device="cpu")
    assert torch.equal(F.dequantize_4bit(param.data, param.quant_state), theirs)


@pytest.mark.parametrize("double", [False, True])
def test_the_keys_are_theirs(double: bool) -> None:
    """Names, shapes, dtypes and the JSON's text. Fails if a key is added or left out."""
    layer = bnb_layer(double, 64, torch.bfloat16)
    theirs = {k: v for k, v in state_of(layer).items() if not k.endswith(".bias")}
    ours = to_bnb(NAME, from_bnb(NAME, theirs))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
        assert ours[key].dtype == tensor.dtype


@pytest.mark.parametrize("double", [False, True])
def test_ours_comes_back_as_it_was(double: bool) -> None:
    """Also odd sizes. Fails if the offset loses bits in the JSON."""
    packed = NF4.quantize(
        sample((33, 77), torch.float16), Recipe(format="nf4", block_size=32, double=double)
    )
    back = from_bnb(NAME, to_bnb(NAME, packed))
    assert (back.recipe, back.shape, back.dtype) == (packed.recipe, packed.shape, packed.dtype)
    assert set(back.parts) == set(packed.parts)
    assert all(torch.equal(part, back.parts[key]) for key, part in packed.parts.items())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_another_storage_dtype_is_viewed_as_bytes(storage: torch.dtype) -> None:
    """Fails if codes stored as 16-bit words are cast instead of viewed."""
    weight = sample((64, 640), torch.bfloat16)
    codes, state = F.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    tensors = {f"{NAME}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    packed = from_bnb(NAME, {f"{NAME}.weight": codes, **tensors})
    assert torch.equal(NF4.dequantize(packed, torch.bfloat16), F.dequantize_4bit(codes, state))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int8"])
def test_announced_shapes_are_those_that_are_written(fmt: str, double: bool) -> None:
    """A file's header comes before its tensors. Fails if the padded JSON has another length, or is
    not readable any more."""
    recipe = Recipe(format=fmt, block_size=128, double=double)
    packed = quant_format(fmt).quantize(sample((33, 640), torch.bfloat16), recipe)
    tensors = to_bnb(NAME, packed, padded=True)
    announced = bnb_shapes(NAME, (33, 640), recipe, packed.dtype)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == announced
    back = from_bnb(NAME, tensors)
    assert all(torch.equal(part, back.parts[key]) for key, part in packed.parts.items())


def int8_layer(dtype: torch.dtype, bias: bool = True, columns: int = 640):
    linear = torch.nn.Linear(columns, 33, bias=bias, dtype=dtype)
    linear.weight.data[2] = 0
    layer = bnb.nn.Linear8bitLt(columns, 33, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(linear.state_dict())
    layer.bias = linear.bias
    ours = QuantLinear.from_linear(linear, Recipe(format="int8"))
    return layer.to("cpu").eval(), ours.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_and_scales_are_equal(dtype: torch.dtype) -> None:
    """Bit for bit, through their checkpoint too. Fails if the weight is not rounded to float16
    first."""
    layer, ours = int8_layer(dtype)
    stored = state_of(layer)
    assert set(stored) == {f"{NAME}.{k}" for k in ("weight", "SCB", "weight_format", "bias")}
    packed = from_bnb(NAME, stored)
    assert packed.recipe == Recipe(format="int8")
    for key, part in packed.parts.items():
        assert torch.equal(part, ours.packed.parts[key]), key
    assert identity([("a", packed)]) == identity([("a", ours.packed)])
    theirs = F.int8_vectorwise_dequant(stored[f"{NAME}.weight"], stored[f"{NAME}.SCB"])
    assert torch.equal(ours.float().weight(), theirs)
    back = to_bnb(NAME, packed)
    assert all(torch.equal(back[key], stored[key]) for key in back)
    assert {*back, f"{NAME}.bias"} == set(stored)


@pytest.mark.filterwarnings("ignore:.*inputs will be cast.*")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outliers", [0, 1, 7])
@pytest.mark.parametrize("rows", [(1,), (9,), (2, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_inference_is_theirs(
    dtype: torch.dtype, rows: tuple[int, ...], outliers: int, bias: bool
) -> None:
    """Linear8bitLt in evaluation: outputs differ by roundings of the output's dtype, taken thrice
    (product, outliers, bias), and by their factor 6.200124e-5 for 1/127**2, which is 1.8e-5 too
    large. Fails if outlier columns are not kept at 16 bits, are counted twice, or if the rest of an
    outlier's row is scaled by it."""
    layer, ours = int8_layer(dtype, bias, columns=1100)
    x = torch.randn(*rows, 1100).clamp(-5.9, 5.9).to(dtype)
    x[..., 0, torch.arange(outliers) * 31] = 11.25
    with torch.no_grad():
        theirs, y = layer(x), ours(x)
    size = theirs.float().abs().max() + 1
    assert (y.float() - theirs.float()).abs().max() <= 3 * size * max(torch.finfo(dtype).eps, 2e-5)


def spoiled(**changes: object) -> dict[str, Tensor]:
    """A good checkpoint with fields of its JSON changed, or tensors replaced or (None) removed."""
    tensors = to_bnb(NAME, NF4.quantize(sample((33, 77), torch.float32), Recipe(format="nf4")))
    key = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    for name, value in changes.items():
        full = f"{NAME}.weight.{name}" if name != "weight" else f"{NAME}.weight"
        if full in tensors:
            tensors[full] = value  # type: ignore[assignment]
        else:
            state[name] = value
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {key: value for key, value in tensors.items() if value is not None}


BAD: dict[str, tuple[dict[str, object], str]] = {
    "no weight": ({"weight": None}, "not a 4-bit bitsandbytes weight"),
    "no absmax": ({"absmax": None}, "lacks 1 tensors: absmax"),
    "no nested map": ({"nested_quant_map": None}, "lacks 1 tensors: nested_quant_map"),
    "block size": ({"blocksize": 128}, "1 of its 4 tensors do not fit"),
    "odd block size": ({"blocksize": 48}, "block size 48 is not one of"),
    "shape": ({"shape": [33, 78]}, r"said to be \[33, 78\], but 2 of its 4"),
    "experts": ({"shape": [3, 11, 77]}, "does not describe a linear weight"),
    "dtype": ({"dtype": "float33"}, "does not describe a linear weight"),
    "nested block size": ({"nested_blocksize": 64}, "decal reads 256 float32"),
    "other map": ({"quant_map": torch.linspace(-1, 1, 16)}, "not the codebook"),
    "float scales": ({"absmax": torch.zeros(40)}, "absmax: torch.float32"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_checkpoint_that_contradicts_itself_is_refused(what: str) -> None:
    """Fails if the check is dropped: the weight would be garbage of the right shape."""
    changes, message = BAD[what]
    with pytest.raises(QuantError) as caught:
        from_bnb(NAME, spoiled(**changes))
    assert caught.match(message)


def test_int8_checkpoints_that_contradict_themselves_are_refused() -> None:
    """Fails if codes in the order of one GPU's kernels are read as rows, or scales are those of
    another weight."""
    good = to_bnb(NAME, quant_format("int8").quantize(torch.randn(5, 8), Recipe(format="int8")))
    bad = {
        "order made for one kind of GPU": {"weight_format": torch.tensor(1, dtype=torch.uint8)},
        "holds 4 scales": {"SCB": torch.ones(4)},
        "no int8 matrix": {"weight": torch.ones(5, 8)},
    }
    for message, change in bad.items():
        with pytest.raises(QuantError, match=message):
            from_bnb(NAME, good | {f"{NAME}.{key}": value for key, value in change.items()})


def test_the_config_is_described() -> None:
    """Fails if another tool's config is taken for bitsandbytes', or int8 for 4 bits."""
    for fmt in ("nf4", "fp4"):
        config = quantization_config(Recipe(format=fmt), torch.bfloat16, ["lm_head"])
        assert describe_quantization({"quantization_config": config}) == {
            "format": fmt,
            "double": True,
            "compute_dtype": "bfloat16",
            "skip_modules": ["lm_head"],
        }
    config = quantization_config(Recipe(format="int8"), torch.bfloat16, [])
    int8 = {"format": "int8", "skip_modules": []}
    assert describe_quantization({"quantization_config": config}) == int8
    assert describe_quantization({"quantization_config": {"quant_method": "gptq"}}) is None
    assert describe_quantization({}) is None


def test_other_formats_are_refused_by_name() -> None:
    """Fails if any 4-bit checkpoint is read as NF4."""
    tensors = state_of(bnb_layer(True, 64, torch.float32))
    key = f"{NAME}.weight.quant_state.bitsandbytes__"
    tensors[key + "af4"] = tensors.pop(key + "nf4")
    with pytest.raises(QuantError, match="quantized as `af4`"):
        from_bnb(NAME, tensors)
    with pytest.raises(QuantError, match="`int3`"):
        to_bnb(NAME, Packed(recipe=Recipe(format="int3"), shape=(1, 1), dtype=torch.half, parts={}))

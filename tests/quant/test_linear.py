"""QuantLinear: values, gradients, what it saves, and that its parts are never cast."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from decal.errors import QuantError
from decal.kernels import native, ops, reference_quant
from decal.quant import Recipe
from decal.quant.linear import QuantLinear

RECIPES = [
    Recipe(format="nf4"),
    Recipe(format="nf4", block_size=32, double=False),
    Recipe(format="nf4", block_size=4096),
]


def layer(recipe: Recipe = RECIPES[0], bias: bool = True, dtype: torch.dtype = torch.float32):
    return QuantLinear.from_linear(nn.Linear(77, 33, bias=bias, dtype=dtype), recipe)


def parts_of(module: QuantLinear) -> dict[str, Tensor]:
    return {key: part.detach() for key, part in module.packed.parts.items()}


def same_parts(a: QuantLinear, b: QuantLinear) -> bool:
    ours, theirs = parts_of(a), parts_of(b)
    return list(ours) == list(theirs) and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,)])
def test_forward_and_gradient_in_float64(
    recipe: Recipe, bias: bool, leading: tuple[int, ...]
) -> None:
    """Against an ordinary layer over weight(), to 1e-12. Fails with the bias left out or added
    twice, with dX through the transposed weight, or with leading axes lost."""
    module = layer(recipe, bias).double()
    x = torch.randn(*leading, 77, dtype=torch.float64, requires_grad=True)
    y = module(x)
    expected = nn.functional.linear(x, module.weight(), module.bias)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    way = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, x, way), torch.autograd.grad(expected, x, way)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    """dX against finite differences in float64. Fails if backward scales or drops anything."""
    module = layer().double()
    assert torch.autograd.gradcheck(module, torch.randn(3, 77).double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    """And differs from float64 by the dtype's rounding of weight, product and bias only: 77 terms,
    each within 2 eps, are summed in float32. Fails if 16-bit inputs meet a weight rounded twice as
    coarsely, or the output is left in float32."""
    module = layer()
    x = torch.randn(5, 77).to(dtype).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    weight = module.double().weight()
    exact = x.detach().double() @ weight.T + module.bias
    size = x.detach().double().abs() @ weight.abs().T + module.bias.abs()
    bound = 2 * torch.finfo(dtype).eps * size
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_nothing_is_saved_for_backward() -> None:
    """No tensor reaches autograd's storage, and x is freed. Fails if x, or a dequantized weight, is
    kept on ctx or saved."""
    module, saved = layer(), []
    x = torch.randn(4, 77, requires_grad=True)
    middle = x * 2.0
    gone = weakref.ref(middle)

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(middle)
    held = y.grad_fn.packed.parts
    assert saved == []
    assert {key: part.data_ptr() for key, part in held.items()} == {
        key: part.data_ptr() for key, part in module.packed.parts.items()
    }
    del middle
    gc.collect()
    assert gone() is None
    y.sum().backward()
    assert torch.allclose(x.grad, (2 * module.weight().sum(0)).expand(4, -1), rtol=1e-5, atol=1e-6)


def test_no_gradient_work_where_x_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if dX is computed for the first layer of a model, whose input needs no gradient."""
    module = layer()
    module.bias.requires_grad_(True)
    y = module(torch.randn(4, 77))
    monkeypatch.setattr("decal.quant.codebook.ops.dequantize_4bit", None)
    y.sum().backward()
    assert torch.equal(module.bias.grad, torch.full((33,), 4.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    """The same gradient bit for bit. Fails if backward needs state that recomputation lacks."""
    module = nn.Sequential(layer(), nn.SiLU(), nn.Linear(33, 77), layer())
    x = torch.randn(3, 77, requires_grad=True)
    plain = torch.autograd.grad(module(x).sum(), x)[0]
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, plain)


def test_autocast_computes_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.Linear does. Fails if the weight is dequantized to float32 for float32 inputs and only
    then cast, or the gradient comes back in another dtype than x."""
    dtypes = []

    def spy(*args: object) -> Tensor:
        dtypes.append(args[-1])
        return reference_quant.dequantize_4bit(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(ops.BACKENDS, "dequantize_4bit", {"spy": spy})
    module, x = layer(), torch.randn(3, 77, requires_grad=True)
    with native.forced("none"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(y, module(x.bfloat16()))
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


CASTS: dict[str, tuple[Callable[[QuantLinear], QuantLinear], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to device and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "cpu": (lambda m: m.cpu(), torch.bfloat16),
    "deepcopy": (copy.deepcopy, torch.bfloat16),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), torch.bfloat16),
    "in a model": (lambda m: nn.Sequential(m).half()[0], torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_casting_never_touches_codes_or_scales(name: str, recipe: Recipe) -> None:
    """Fails with _apply left to torch: `.half()` would cast the scales, `.type()` the codes."""
    cast, dtype = CASTS[name]
    module = layer(recipe, dtype=torch.bfloat16)
    before = copy.deepcopy(module)
    after = cast(module)
    assert same_parts(after, before)
    assert after.compute_dtype == after.weight().dtype == after.bias.dtype == dtype
    assert after.packed.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in after.parameters())
    assert torch.equal(after.double().weight(), before.double().weight())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_round_trips(assign: bool, bias: bool) -> None:
    """Through a file, into an empty layer. Fails if a part is a buffer that is not saved, or empty
    layers have other shapes."""
    module = layer(bias=bias)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    empty = QuantLinear.empty(77, 33, bias, module.recipe, torch.float32)
    assert all(p.is_meta for p in empty.parameters())
    empty = empty if assign else empty.to_empty(device="cpu")
    empty.load_state_dict(torch.load(file), assign=assign)
    assert same_parts(empty, module)
    assert torch.equal(empty.weight(), module.weight())
    x = torch.randn(2, 77)
    assert torch.equal(empty(x), module(x))


def test_a_state_of_another_recipe_is_refused() -> None:
    """Float32 scales into uint8 ones would be truncated by copy_. Fails without the check."""
    plain = QuantLinear.from_linear(nn.Linear(77, 33), RECIPES[1])
    state = layer(Recipe(format="nf4", block_size=32)).state_dict()
    with pytest.raises(QuantError, match=r"`0\.absmax` is torch.uint8 .* holds torch.float32"):
        nn.Sequential(plain).load_state_dict({f"0.{key}": v for key, v in state.items()})


def test_a_part_written_to_before_backward_is_an_error() -> None:
    """Fails without the version guard: dX would belong to another weight than y."""
    module, x = layer(), torch.randn(2, 77, requires_grad=True)
    y = module(x)
    with torch.no_grad():
        module.weight_packed.zero_()
    with pytest.raises(RuntimeError, match="written to between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_linear_is_the_same_layer(dtype: torch.dtype) -> None:
    """Bit for bit what weight() gives in that dtype. Fails if it goes through compute_dtype."""
    module = layer(dtype=torch.float16)
    plain = module.to_linear(dtype)
    assert isinstance(plain, nn.Linear)
    assert torch.equal(plain.weight, module.to(dtype).weight())
    assert torch.equal(plain.bias, module.bias)


def test_size_and_print() -> None:
    """Fails if nbytes counts logical weights, or the bias."""
    module = layer()
    n = 77 * 33
    scales = -(-n // 64)
    assert module.nbytes == (n + 1) // 2 + scales + 4 * 1 + 4
    assert "in_features=77, out_features=33, bias=True, format=nf4" in repr(module)
    assert (module.kind, module.shape) == ("linear", (33, 77))

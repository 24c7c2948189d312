"""What the bench of kernels times: decal's ops and their peers on the same data.

A row is a pair of callables and what the machine must do at least: operations, bytes read, bytes
written. Memory-bound rows go round copies of their inputs that no cache holds together, as a
training step comes back to a layer only after all others. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.nn import functional

from bench.shapes import KNOWN, LENGTH, RANK, ROWS
from decal.kernels import ops
from decal.kernels.stored import Stored
from decal.quant import FORMATS, Recipe
from decal.quant.codebook import CodebookFormat

TOKENS = ROWS * LENGTH
BEYOND_CACHES = 96 * 2**20
"""Bytes; more than what the copies of one row's inputs find in a cache."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    shape: str
    ours: Call
    peer: str
    theirs: Call
    flops: float = 0.0
    read: float = 0.0
    """Bytes."""
    written: float = 0.0


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def round_robin(make: Callable[[], tuple[Tensor, ...]], call: Callable[..., Any]) -> Call:
    """`call` on ever other copies of its inputs."""
    first = make()
    count = -(-BEYOND_CACHES // sum(x.nbytes for x in first))
    turns = cycle([first, *(tuple(x.clone() for x in first) for _ in range(min(count, 64)))])
    return lambda: call(*next(turns))


def backward(y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Call:
    """The backward pass alone of a graph that is made once."""
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


# --- products -----------------------------------------------------------------------------------


def linears(shape: str) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears of a layer that differ."""
    config = KNOWN[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    wide = {"gate": (inner, hidden), "down": (hidden, inner)}
    return {"q": (hidden, hidden), "k": (kv, hidden), **wide}


def nf4(weight: Tensor) -> tuple[Stored, Tensor, Any]:
    """decal's packed weight; bitsandbytes' packed weight and its state."""
    form = FORMATS["nf4"]
    packed = form.quantize(weight, Recipe(format="nf4", double=True))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return form.stored(packed), codes, state


def products(shape: str) -> Iterator[Row]:
    """Forward and the input's gradient, of a bf16 and of a 4-bit weight."""
    for name, (n, k) in linears(shape).items():
        weight = normal(n, k)
        text = f"{name} {TOKENS} x {k} -> {n}"
        packed, codes, state = nf4(weight)
        peer = "torch bf16 matmul"
        yield from _product("bf16", text, Stored("dense", (n, k), weight), peer, lambda w=weight: w)
        peer = "bitsandbytes dequantize, torch matmul"
        whole = partial(bnb.dequantize_4bit, codes, state)
        yield from _product("nf4", text, packed, peer, whole)
    config = KNOWN[shape]
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    head = Stored("dense", (vocabulary, hidden), normal(vocabulary, hidden))
    text = f"head {LENGTH} x {hidden} -> {vocabulary}"
    yield from _product("bf16", text, head, "torch bf16 matmul", lambda: head.data, tokens=LENGTH)


def _product(
    form: str, text: str, weight: Stored, peer: str, whole: Call, tokens: int = TOKENS
) -> Iterator[Row]:
    n, k = weight.shape
    x, grad, flops = normal(tokens, k), normal(tokens, n), 2.0 * tokens * n * k
    forward = Row(
        f"project {form}",
        text,
        lambda: ops.project(x, weight),
        peer,
        lambda: x @ whole().t(),
        flops,
    )
    yield forward
    yield Row(
        f"project_back {form}",
        text,
        lambda: ops.project_back([(grad, weight)]),
        peer,
        lambda: grad @ whole(),
        flops,
    )


def low_rank(shape: str) -> Iterator[Row]:
    """The products with a side of rank r: what they read is what they take."""
    k = KNOWN[shape]["intermediate_size"]
    A, p = normal(RANK, k), normal(TOKENS, RANK)
    read, flops = 2.0 * TOKENS * k, 2.0 * TOKENS * k * RANK
    into = round_robin(lambda: (normal(TOKENS, k),), lambda x: ops.into_rank(x, A))
    torchs = round_robin(lambda: (normal(TOKENS, k),), lambda x: x @ A.t())
    text = f"{TOKENS} x {k}, r {RANK}"
    yield Row("into_rank", text, into, "torch bf16 matmul", torchs, flops, read)
    over = round_robin(lambda: (normal(TOKENS, k),), lambda q: ops.over_rows(p, q))
    torchs = round_robin(lambda: (normal(TOKENS, k),), lambda q: p.float().t() @ q.float())
    yield Row("over_rows", text, over, "torch float32 matmul", torchs, flops, read)


def decoding(shape: str) -> Iterator[Row]:
    """One token: the weights are read once, and that is all."""
    for name, (n, k) in linears(shape).items():
        x, weight = normal(1, k), normal(n, k)
        packed, codes, state = nf4(weight)
        size = n * k * (0.5 + 1 / 64)  # a byte of scale for 64 weights
        count = min(256, int(BEYOND_CACHES // size) + 1)
        ours = cycle([packed._replace(data=packed.data.clone()) for _ in range(count)])
        theirs = cycle([codes.clone() for _ in range(count)])
        yield Row(
            "project nf4, 1 token",
            f"{name} 1 x {k} -> {n}",
            lambda x=x, ours=ours: ops.project(x, next(ours)),
            "bitsandbytes matmul_4bit",
            lambda x=x, theirs=theirs, state=state: bitsandbytes.matmul_4bit(
                x, next(theirs).t(), quant_state=state
            ),
            read=size,
        )


# --- attention ----------------------------------------------------------------------------------


def attention(shape: str) -> Iterator[Row]:
    config = KNOWN[shape]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    D = config["hidden_size"] // heads
    bounds = torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32)
    flat = tuple(normal(TOKENS, h, D).requires_grad_() for h in (heads, kv, kv))
    rows = tuple(
        x.detach().view(ROWS, LENGTH, -1, D).transpose(1, 2).requires_grad_() for x in flat
    )

    def ours() -> Tensor:
        return ops.attention_flat(*flat, bounds, D**-0.5)

    def theirs() -> Tensor:
        return functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

    text = f"{ROWS} x {LENGTH}, {heads}/{kv} heads of {D}"
    visible = ROWS * LENGTH * (LENGTH + 1) / 2 * heads * D
    peer = "torch SDPA"
    yield Row("attention", text, _frozen(ours), peer, _frozen(theirs), 4 * visible)
    grad = normal(TOKENS, heads, D)
    in_rows = grad.view(ROWS, LENGTH, heads, D).transpose(1, 2)
    both = backward(ours(), flat, grad), backward(theirs(), rows, in_rows)
    yield Row("attention backward", text, both[0], peer, both[1], 10 * visible)


def _frozen(call: Call) -> Call:
    return torch.no_grad()(call)


# --- one pass over the activations --------------------------------------------------------------


def elementwise(shape: str) -> Iterator[Row]:
    hidden, inner = (KNOWN[shape][k] for k in ("hidden_size", "intermediate_size"))
    yield from norms(hidden)
    yield from gates(inner)
    yield from rotations(shape)
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    positions = torch.arange(TOKENS) % LENGTH
    drawn = torch.empty(TOKENS, inner, dtype=torch.bool)
    yield Row(
        "dropout_keep",
        f"{TOKENS} x {inner}",
        lambda: ops.dropout_keep(0, 0, 1, 2, ids, positions, inner, 0.05),
        "torch bernoulli_",
        lambda: drawn.bernoulli_(0.95),
        written=float(drawn.nbytes),
    )


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """What transformers' models do."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def norms(width: int) -> Iterator[Row]:
    text, size = f"{TOKENS} x {width}", 2.0 * TOKENS * width
    weight = normal(width)
    one = partial(round_robin, lambda: (normal(TOKENS, width),))
    ours = one(lambda x: ops.rms_norm(x, weight, 1e-6))
    theirs = one(lambda x: _norm(x, weight))
    yield Row("rms_norm", text, ours, "transformers' sequence", theirs, 0.0, size, size)
    x, grad = normal(TOKENS, width).requires_grad_(), normal(TOKENS, width)
    _, rstd = ops.rms_norm(x.detach(), weight, 1e-6)
    yield Row(
        "rms_norm_backward",
        text,
        round_robin(
            lambda: (grad, x.detach()), lambda g, x: ops.rms_norm_backward(g, x, weight, rstd)
        ),
        "transformers' sequence, autograd",
        backward(_norm(x, weight), (x,), grad),
        read=2 * size,
        written=size,
    )


def gates(width: int) -> Iterator[Row]:
    text, size = f"{TOKENS} x {width}", 2.0 * TOKENS * width
    two = partial(round_robin, lambda: (normal(TOKENS, width), normal(TOKENS, width)))
    ours, theirs = two(ops.swiglu), two(lambda gate, up: functional.silu(gate) * up)
    yield Row("swiglu", text, ours, "torch silu, mul", theirs, 0.0, 2 * size, size)
    gate, up = (normal(TOKENS, width).requires_grad_() for _ in range(2))
    grad = normal(TOKENS, width)
    yield Row(
        "swiglu_backward",
        text,
        round_robin(lambda: (grad, gate.detach(), up.detach()), ops.swiglu_backward),
        "torch silu, mul, autograd",
        backward(functional.silu(gate) * up, (gate, up), grad),
        read=3 * size,
        written=3 * size,
    )


def rotations(shape: str) -> Iterator[Row]:
    heads = KNOWN[shape]["num_attention_heads"]
    D = KNOWN[shape]["hidden_size"] // heads
    cos, sin = normal(TOKENS, D), normal(TOKENS, D)
    half = D // 2

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos[:, None] + turned * sin[:, None]

    one = partial(round_robin, lambda: (normal(TOKENS, heads, D),))
    size = 2.0 * TOKENS * heads * D
    ours, theirs = one(lambda x: ops.rotate(x, cos, sin)), one(rotated)
    text = f"{TOKENS} x {heads} x {D}"
    yield Row("rotate", text, ours, "transformers' sequence", theirs, 0.0, size, size)


def losses(shape: str) -> Iterator[Row]:
    """Loss and gradient; repeated on its own output, which takes the same time."""
    vocabulary = KNOWN[shape]["vocab_size"]
    targets = torch.arange(LENGTH) % vocabulary
    logits = normal(LENGTH, vocabulary)
    watched = logits.clone().requires_grad_()

    def theirs() -> Tensor:
        loss = functional.cross_entropy(watched.float(), targets, reduction="sum")
        return torch.autograd.grad(loss, watched)[0]

    yield Row(
        "softmax_loss",
        f"{LENGTH} x {vocabulary}",
        lambda: ops.softmax_loss(logits, targets, True),
        "torch cross_entropy in float32",
        theirs,
        read=float(logits.nbytes),
        written=float(logits.nbytes),
    )


# --- quantization -------------------------------------------------------------------------------


def quantization(shape: str) -> Iterator[Row]:
    """As many weights at once as leave the caches, of a small base all."""
    width, layers = (KNOWN[shape][k] for k in ("hidden_size", "num_hidden_layers"))
    n = min(layers * sum(a * b for a, b in linears(shape).values()), 2**24) // width * width
    x, text = normal(n), f"{n / 1e6:.1f}M weights"
    form = FORMATS["nf4"]
    assert isinstance(form, CodebookFormat)
    code = form.code(x.device)
    packed, absmax = ops.quantize_4bit(x, code, 64)
    codes, state = bnb.quantize_4bit(x, quant_type="nf4")
    size, peer = 2.0 * n, "bitsandbytes"
    yield Row(
        "quantize nf4",
        text,
        lambda: ops.quantize_4bit(x, code, 64),
        peer,
        lambda: bnb.quantize_4bit(x, quant_type="nf4"),
        read=size,
        written=n / 2,
    )
    yield Row(
        "dequantize nf4",
        text,
        lambda: ops.dequantize_4bit(packed, absmax, code, 64, n, torch.bfloat16),
        peer,
        lambda: bnb.dequantize_4bit(codes, state),
        read=n / 2,
        written=size,
    )
    rows = x.view(n // width, width)
    held, scales = ops.quantize_rows(rows)
    yield Row(
        "quantize int8",
        text,
        lambda: ops.quantize_rows(rows),
        peer,
        lambda: bnb.int8_vectorwise_quant(rows.half()),
        read=size,
        written=float(n),
    )
    yield Row(
        "dequantize int8",
        text,
        lambda: ops.dequantize_rows(held, scales, torch.bfloat16),
        peer,
        lambda: bnb.int8_vectorwise_dequant(held, scales).bfloat16(),
        read=float(n),
        written=size,
    )


FAMILIES: dict[str, Callable[[str], Iterator[Row]]] = {
    "products": products,
    "low_rank": low_rank,
    "decoding": decoding,
    "attention": attention,
    "elementwise": elementwise,
    "losses": losses,
    "quantization": quantization,
}

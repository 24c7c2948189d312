"""LoRA (Hu et al. 2021): y = base(x) + scale * drop(x) A^T B^T, with PEFT's meaning of each word.

    x [T, in]    rows of the input, all leading dimensions flattened
    A [r, in]    B [out, r]    float32 masters, cast to the compute dtype for each product
    z = (keep . x) A^T               [T, r]
    y = y_base + s * z B^T           s = scale / (1 - p)

Backward, with g = dL/dy:

    dB = s * g^T z        dA = (s g B)^T (keep . x)        dx = keep . ((s g B) A)

Saved are x, which the layer's input is anyway and which projections of one input share, and z,
which has r columns. The dropout mask `keep` is a hash of names and numbers and is computed again
in backward; storing it would cost T * in bytes a layer, and PEFT's way of dropping, a second x.

An embedding is the linear map of one-hot rows: z is A's columns of the tokens, times the gain of a
scaled embedding, nothing is dropped, and dA is added up column by column. The gradient of the
padding token is left out, as torch leaves it out of the base's.

Biases make the delta affine. `lora_bias` is B's own, scaled like B A; a trained bias of the base
(`bias: lora_only | all`) is kept whole and acts as its difference from the base's, so that the
base is untouched and weighted sets add up:

    y = ... + scale * b + (bias - base bias)

In training, masks follow the routing's dropout key. A pass without one (a plain torch loop) draws
them from torch's generator: one number per call, from which forward and backward make the mask.

A and B are parameters in float32 and get float32 gradients, also from bf16 rows.

Here the update is added to whatever the base layer returned. A frozen base layer with this one
adapter is one product, base and update together: `lines.py`.

Rejected: computing the update in float32, as PEFT does without autocast. It needs a float32 copy
of every input, and its extra digits vanish when the sum is rounded to the base's output.

Knows no models, files or formats; a layer's names arrive as a `Slot`.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from decal.adapters.base import (
    BaseLayer,
    DropoutKey,
    LowRank,
    Piece,
    Routing,
    as_master,
    current_routing,
    keeping_masters,
)
from decal.adapters.init import module_generator, start_values
from decal.config import LoraConfig
from decal.kernels import ops
from decal.kernels.stored import Keep, keep_words


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where an adapter sits: all that a method may know about the layer's surroundings."""

    module: str
    """Full name of the layer in its model."""
    group: str
    """Name of the layer's input; layers that share an input share the dropout mask."""
    adapter: str
    """The name that its dropout masks follow from."""
    shape: tuple[int, int]
    """[out, in] of the base weight."""
    device: torch.device
    kind: str = "linear"
    """linear | embedding"""
    bias: Tensor | None = None
    """[out], the base's bias where a copy of it is to be trained."""


class Dropout(NamedTuple):
    """One layer's dropout in one forward pass; masks are functions of it."""

    key: DropoutKey
    adapter: int
    input: int
    p: float

    def words(self, rows: int, features: int, device: torch.device) -> Keep:
        """What to keep of an input of so many rows, which the key has, and features."""
        return keep_words(
            self.key.seed,
            self.key.epoch,
            self.adapter,
            self.input,
            self.key.sample_ids.reshape(-1).to(device),
            self.key.positions.reshape(-1).to(device),
            features,
            self.p,
        )


class Drawn(NamedTuple):
    """Dropout of a pass without a key: the mask follows from one number that torch has drawn."""

    seed: int
    p: float

    @classmethod
    def now(cls, p: float) -> Drawn:
        """A new mask. Recomputation draws it again: checkpointing puts torch's generator back."""
        return cls(int(torch.randint(1 << 62, (), device="cpu")), p)

    def words(self, rows: int, features: int, device: torch.device) -> Keep:
        """What to keep of an input of so many rows and features."""
        positions = torch.arange(rows, device=device)
        return keep_words(
            self.seed, 0, 0, 0, torch.zeros_like(positions), positions, features, self.p
        )


def salt(name: str) -> int:
    """A number below 2^31 for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: the function below has chosen its dtypes already."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _add(ctx: Any, y_base: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """y_base + scale * z B^T, in y_base's memory where nobody else looks at it."""
    B_t = B.to(y_base.dtype).t()
    leaf = y_base.requires_grad and y_base.is_leaf
    if y_base.is_contiguous() and not y_base._is_view() and not leaf:
        y_base.view(-1, y_base.shape[-1]).addmm_(z, B_t, alpha=scale)
        ctx.mark_dirty(y_base)
        return y_base
    flat = y_base.reshape(-1, y_base.shape[-1])
    return torch.addmm(flat, z, B_t, alpha=scale).view(y_base.shape)


class _Update(torch.autograd.Function):
    """y_base + scale * drop(x) A^T B^T + shift; see the formulas at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y_base: Tensor,
        A: Tensor,
        B: Tensor,
        shift: Tensor | None,
        scale: float,
        dropout: Dropout | Drawn | None,
    ) -> Tensor:
        with _exact(x.device):
            rows = x.reshape(-1, x.shape[-1])
            keep = None if dropout is None else dropout.words(len(rows), x.shape[-1], x.device)
            scale = scale if dropout is None else scale / (1.0 - dropout.p)
            z = ops.into_rank(rows, A.to(x.dtype), keep)
            ctx.save_for_backward(x, z, A, B)
            ctx.scale, ctx.keep = scale, keep
            ctx.shift_dtype = None if shift is None else shift.dtype
            y = _add(ctx, y_base, z, B, scale)
            return y if shift is None else y.add_(shift.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        need_x, need_y, need_A, need_B, need_shift = ctx.needs_input_grad[:5]
        keep, scale = ctx.keep, ctx.scale
        dx = dA = dB = d_shift = None
        with _exact(grad.device):
            g = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
            if need_B:
                dB = ops.over_rows(g, z, scale=scale).to(B.dtype)
            if need_shift:
                d_shift = g.sum(0, dtype=ctx.shift_dtype)
            if need_A or need_x:
                gz = (g @ B.to(x.dtype)).mul_(scale)
                if need_A:
                    rows = x.reshape(-1, x.shape[-1])
                    dA = ops.over_rows(gz, rows, keep).to(A.dtype)
                if need_x:
                    dx = gz @ A.to(x.dtype)
                    dx = (dx if keep is None else keep.drop_(dx)).view(x.shape)
        return dx, grad if need_y else None, dA, dB, d_shift, None, None


class _Lookup(torch.autograd.Function):
    """y_base + scale * gain * A[:, ids]^T B^T; see the formulas at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, y_base: Tensor, A: Tensor, B: Tensor, scale: float, base: Any
    ) -> Tensor:
        with _exact(y_base.device):
            z = A.index_select(1, ids.flatten()).t().to(y_base.dtype)
            z = (z * base.gain).to(y_base.dtype)
            ctx.save_for_backward(ids, z, A, B)
            ctx.scale, ctx.gain, ctx.padding_idx = scale, base.gain, base.padding_idx
            return _add(ctx, y_base, z, B, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, z, A, B = ctx.saved_tensors
        dA = dB = None
        with _exact(grad.device):
            g = grad.reshape(-1, grad.shape[-1]).to(z.dtype)
            if ctx.needs_input_grad[3]:
                dB = ops.over_rows(g, z, scale=ctx.scale).to(B.dtype)
            if ctx.needs_input_grad[2]:
                gz = ((g @ B.to(z.dtype)) * (ctx.gain * ctx.scale)).to(A.dtype)
                if ctx.padding_idx is not None:
                    gz.masked_fill_((ids.flatten() == ctx.padding_idx)[:, None], 0.0)
                dA = torch.zeros_like(A).index_add_(1, ids.flatten(), gz.t())
        return None, grad if ctx.needs_input_grad[1] else None, dA, dB, None, None


class Lora(nn.Module):
    """One LoRA adapter on one linear layer or embedding.

    Args:
        A: float32 [r, in].
        B: float32 [out, r].
        scale: what multiplies B A.
        dropout: share of A's input that is dropped in training; none of an embedding's.
        slot: the layer it sits on.
        B_bias: float32 [out], B's own bias, scaled like B A.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scale: float,
        dropout: float,
        slot: Slot,
        B_bias: Tensor | None = None,
    ):
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.B_bias = None if B_bias is None else nn.Parameter(B_bias)
        self.bias = None if slot.bias is None else nn.Parameter(as_master(slot.bias))
        self.scale = scale
        self.dropout = dropout
        self.module_name = slot.module
        self.adapter_salt = salt(slot.adapter)
        self.input_salt = salt(slot.group)

    @classmethod
    def create(cls, config: LoraConfig, slot: Slot, seed: int) -> Lora:
        """A new adapter with its starting values; without data on the meta device."""
        out, columns = slot.shape
        r = config.rank_of(slot.module)
        if slot.device.type == "meta":
            A = torch.empty(r, columns, device="meta")
            B = torch.empty(out, r, device="meta")
        else:
            generator = module_generator(seed, slot.module)
            A, B = start_values(slot.shape, r, config.init_lora_weights, generator, slot.kind)
            A, B = A.to(slot.device), B.to(slot.device)
        return cls(
            A,
            B,
            scale=config.scaling_of(slot.module),
            dropout=config.lora_dropout,
            slot=slot,
            B_bias=torch.zeros_like(B[:, 0]) if config.lora_bias else None,
        )

    def forward(
        self,
        x: Tensor,
        y_base: Tensor,
        base: BaseLayer,
        factor: float = 1.0,
        piece: Piece | None = None,
    ) -> Tensor:
        """y_base + factor * (scale * B A drop(x) + shift), in y_base's dtype; y_base is consumed.

        x [.., in] (ids [..] of an embedding), y_base [.., out]. Rows of x must be rows of the
        dropout key, if the current routing has one; AdapterError otherwise.
        """
        scale = self.scale * factor
        if base.kind == "embedding":
            found: Tensor = _Lookup.apply(x, y_base, self.A, self.B, scale, base)
            return found
        rows = x.numel() // x.shape[-1]
        dropout = self.drop(current_routing(), piece or Piece(0, rows, rows))
        shift = self.shift(base.bias)
        shift = shift if shift is None or factor == 1.0 else shift * factor
        # Under autocast the base has cast x for itself; its output says to what.
        x = x.to(y_base.dtype)
        result: Tensor = _Update.apply(x, y_base, self.A, self.B, shift, scale, dropout)
        return result

    @property
    def plain(self) -> bool:
        """Whether it is nothing but scale * B A."""
        return self.B_bias is None and self.bias is None

    def drop(self, routing: Routing | None, piece: Piece) -> Dropout | Drawn | None:
        """How these rows of its input are dropped in a pass with this routing.

        Raises AdapterError where they are not rows of the routing's dropout key.
        """
        if self.dropout == 0:
            return None
        key = None if routing is None else routing.key_of(piece, self.module_name)
        if key is None:
            drawn = self.training and not (routing and routing.keys)
            return Drawn.now(self.dropout) if drawn else None
        return Dropout(key, self.adapter_salt, self.input_salt, self.dropout)

    def shift(self, base_bias: Tensor | None) -> Tensor | None:
        """float32 [out], what the biases add to the output of a layer with `base_bias`, or None."""
        shift = None if self.B_bias is None else self.B_bias * self.scale
        if self.bias is None or base_bias is None:
            return shift
        moved = self.bias - base_bias
        return moved if shift is None else shift + moved

    def merged_bias(self, base_bias: Tensor | None) -> Tensor | None:
        """[out], the bias of the merged layer, in float32 or the base's wider dtype.

        None where base and adapter have none.
        """
        shift = None if self.B_bias is None else self.B_bias * self.scale
        if base_bias is None:
            return shift
        start = base_bias if self.bias is None else self.bias
        start = start.to(torch.promote_types(base_bias.dtype, self.B.dtype))
        return start if shift is None else start + shift

    def merged(self, weight: Tensor) -> Tensor:
        """float32 [out, in]: the weight plus scale * B A (float64 for a float64 weight)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        A, B = self.A.detach().to(wide.dtype), self.B.detach().to(wide.dtype)
        return wide + (B @ A) * self.scale

    def low_rank(self) -> LowRank:
        """A, B, scale, dropout and B's bias, as they are."""
        return LowRank(self.A, self.B, self.scale, self.dropout, self.B_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Lora:
        """Moves like any module, but `.half()` and `.bfloat16()` leave the masters in float32."""
        super()._apply(keeping_masters(fn), recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"lora_A: {list(self.A.shape)}, lora_B: {list(self.B.shape)}, "
            f"scaling={self.scale:g}, dropout={self.dropout:g}"
        )

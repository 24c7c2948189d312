"""LoRA (Hu et al. 2021): y = base(x) + scale * drop(x) A^T B^T, with PEFT's meaning of each word.

    x [T, in]    rows of the input, all leading dimensions flattened
    A [r, in]    B [out, r]    float32 masters, cast to the compute dtype for each product
    z = inv * (keep . x) A^T               [T, r]     inv = 1 / (1 - p)
    y = y_base + scale * z B^T

Backward, with g = dL/dy and s = scale * inv:

    dB = scale * g^T z        dA = (s g B)^T (keep . x)        dx = keep . ((s g B) A)

Saved are x, which the layer's input is anyway and which projections of one input share, and z,
which has r columns. The dropout mask `keep` is a hash of names and numbers and is computed again
in backward; storing it would cost T * in bytes a layer, and PEFT's way of dropping, a second x.

A and B are parameters in float32 and get float32 gradients. The products that sum over all T rows
leave bf16 with a rounded sum; `_over_rows` keeps float32 without a float32 copy of x or g.

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

from decal.adapters.base import BaseLayer, DropoutKey, LowRank, current_routing
from decal.adapters.init import module_generator, start_values
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.kernels import ops

_CHUNK = 1 << 20
"""Elements that are float32 at one time where a product over rows is summed on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where an adapter sits: all that a method may know about the layer's surroundings."""

    module: str
    """Full name of the layer in its model."""
    group: str
    """Name of the layer's input; layers that share an input share the dropout mask."""
    adapter: str
    shape: tuple[int, int]
    """[out, in] of the base weight."""
    device: torch.device


class Dropout(NamedTuple):
    """One layer's dropout in one forward pass; masks are functions of it."""

    key: DropoutKey
    adapter: int
    input: int
    p: float

    def keep(self, like: Tensor) -> Tensor:
        """bool [T, features] for rows [T, features], True with probability 1 - p."""
        return ops.dropout_keep(
            self.key.seed,
            self.key.epoch,
            self.adapter,
            self.input,
            self.key.sample_ids.reshape(-1).to(like.device),
            self.key.positions.reshape(-1).to(like.device),
            like.shape[-1],
            self.p,
        )


def salt(name: str) -> int:
    """A number below 2^31 for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: the function below has chosen its dtypes already."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _over_rows(p_TM: Tensor, q_TN: Tensor) -> Tensor:
    """p^T q [M, N], summed and returned in float32 (float64 for float64)."""
    if p_TM.dtype.itemsize >= 4:
        return p_TM.t() @ q_TN
    if p_TM.is_cuda:
        return torch.mm(p_TM.t(), q_TN, out_dtype=torch.float32)
    total = torch.zeros(p_TM.shape[1], q_TN.shape[1], device=p_TM.device)
    rows = max(1, _CHUNK // max(p_TM.shape[1], q_TN.shape[1]))
    for p, q in zip(p_TM.split(rows), q_TN.split(rows), strict=True):
        total.addmm_(p.float().t(), q.float())
    return total


class _Update(torch.autograd.Function):
    """y_base + scale * drop(x) A^T B^T; see the formulas at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y_base: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: Dropout | None,
    ) -> Tensor:
        with _exact(x.device):
            rows = x.reshape(-1, x.shape[-1])
            if dropout is not None:
                rows = rows.where(dropout.keep(rows), rows.new_zeros(()))
            z = rows @ A.to(x.dtype).t()
            if dropout is not None:
                z.mul_(1.0 / (1.0 - dropout.p))
            ctx.save_for_backward(x, z, A, B)
            ctx.scale, ctx.dropout = scale, dropout
            B_t = B.to(x.dtype).t()
            if y_base.is_contiguous() and not y_base._is_view():
                y_base.view(-1, y_base.shape[-1]).addmm_(z, B_t, alpha=scale)
                ctx.mark_dirty(y_base)
                return y_base
            flat = y_base.reshape(-1, y_base.shape[-1])
            return torch.addmm(flat, z, B_t, alpha=scale).view(y_base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        need_x, need_y, need_A, need_B = ctx.needs_input_grad[:4]
        dropout, scale = ctx.dropout, ctx.scale
        dx = dA = dB = None
        with _exact(grad.device):
            g = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
            if need_B:
                dB = _over_rows(g, z).mul_(scale).to(B.dtype)
            if need_A or need_x:
                inv = 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)
                gz = (g @ B.to(x.dtype)).mul_(scale * inv)
                keep = None if dropout is None else dropout.keep(x)
                if need_A:
                    rows = x.reshape(-1, x.shape[-1])
                    rows = rows if keep is None else rows.where(keep, rows.new_zeros(()))
                    dA = _over_rows(gz, rows).to(A.dtype)
                if need_x:
                    dx = gz @ A.to(x.dtype)
                    dx = (dx if keep is None else dx.mul_(keep)).view(x.shape)
        return dx, grad if need_y else None, dA, dB, None, None


class Lora(nn.Module):
    """One LoRA adapter on one linear layer.

    Args:
        A: float32 [r, in].
        B: float32 [out, r].
        scale: what multiplies B A.
        dropout: share of A's input that is dropped while a routing carries a dropout key.
        slot: the layer it sits on.
    """

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, dropout: float, slot: Slot):
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout
        self.module_name = slot.module
        self.adapter_salt = salt(slot.adapter)
        self.input_salt = salt(slot.group)

    @classmethod
    def create(cls, config: LoraConfig, slot: Slot, seed: int) -> Lora:
        """A new adapter with its starting values; without data on the meta device."""
        out, columns = slot.shape
        if slot.device.type == "meta":
            A = torch.empty(config.r, columns, device="meta")
            B = torch.empty(out, config.r, device="meta")
        else:
            generator = module_generator(seed, slot.module)
            A, B = start_values(slot.shape, config.r, config.init_lora_weights, generator)
            A, B = A.to(slot.device), B.to(slot.device)
        return cls(A, B, scale=config.scaling, dropout=config.lora_dropout, slot=slot)

    def forward(self, x: Tensor, y_base: Tensor, base: BaseLayer, factor: float = 1.0) -> Tensor:
        """y_base + factor * scale * B A drop(x), in y_base's dtype; y_base is consumed.

        x [.., in], y_base [.., out]. Rows of x must be the rows of the dropout key, if the current
        routing has one; AdapterError otherwise.
        """
        routing = current_routing()
        dropout = None
        if routing is not None and routing.dropout is not None and self.dropout > 0:
            key = routing.dropout
            rows = x.numel() // x.shape[-1]
            if rows != key.positions.numel():
                raise AdapterError(
                    f"dropout on {self.module_name} cannot tell its rows apart: the layer got "
                    f"{rows}, the batch has {key.positions.numel()} tokens",
                    hint="leave this module out of target_modules or set lora_dropout: 0",
                )
            dropout = Dropout(key, self.adapter_salt, self.input_salt, self.dropout)
        # Under autocast the base has cast x for itself; its output says to what.
        x = x.to(y_base.dtype)
        result: Tensor = _Update.apply(x, y_base, self.A, self.B, self.scale * factor, dropout)
        return result

    def merged(self, weight: Tensor) -> Tensor:
        """float32 [out, in]: the weight plus scale * B A (float64 for a float64 weight)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        A, B = self.A.detach().to(wide.dtype), self.B.detach().to(wide.dtype)
        return wide + (B @ A) * self.scale

    def low_rank(self) -> LowRank:
        """A, B, scale and dropout, as they are."""
        return LowRank(self.A, self.B, self.scale, self.dropout)

    def _apply(self, fn: Any, recurse: bool = True) -> Lora:
        """Moves like any module, but `.half()` and `.bfloat16()` leave the masters in float32."""

        def keep_masters(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype.itemsize < min(4, tensor.dtype.itemsize)
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_masters, recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"lora_A: {list(self.A.shape)}, lora_B: {list(self.B.shape)}, "
            f"scaling={self.scale:g}, dropout={self.dropout:g}"
        )

"""Proof by trial that an attached adapter acts: one pass of a few tokens, watched.

A wrapper that stands in its place is no proof that the model computes with it. A fused kernel reads
`.weight` and calls nobody, a list keeps a second reference to the layer, a forward was replaced,
the output of a layer is thrown away. So every wrapper is watched during one pass:

    called    it ran at least once, and each run of the base layer came through it
    exact     output - base output = scale * B A x + shift, element by element, to rounding
    reached   the result depends on what it returned

`reached` is read off the autograd graph, which costs nothing: the pass runs with gradients and the
nodes behind the result are collected. Where the graph is cut (`detach`, `no_grad`) the layer's
output is disturbed by noise of its own size instead, and the result must change.

A wrapper that did not run is an error where its owner did run. Where the owner did not either
(an expert that no token chose, the image part of a model that got text) it is a note, and the
wrapper is tried on random rows. So is every wrapper of a model that takes no tokens.

Rejected: comparing the logits with the adapter on and off. It takes a second pass, a small delta
drowns in bf16, and one module out of two hundred does not show.

Knows no files and no settings. Models on the meta device compute nothing and are passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from decal.adapters import AdaptedLayer, BaseLayer, Lora, ReplacedModule, Routing, routed
from decal.errors import AdapterError, first_of
from decal.model.state import adapted_layers, lora_of, replaced_modules
from decal.model.survey import base_modules, unwrapped

TOKENS = 4
"""Length of the trial pass; long enough that no softmax has one entry only."""

_TOLERANCE = 8
"""Roundings of the output's dtype, the base's and the delta's own, that `exact` allows."""
_LEAST = 1e-4
"""Relative error that is allowed in float32, where sums of many terms dominate."""


@dataclass
class _Watched:
    """One wrapper and what the pass showed of it."""

    module: str
    wrapper: AdaptedLayer | ReplacedModule
    calls: int = 0
    inner: int = 0
    """Runs of the base layer, through the wrapper or past it."""
    y_base: Tensor | None = None
    wrong: str | None = None
    outputs: int = 0
    """Calls that returned one tensor."""
    nodes: set[Any] = field(default_factory=set)
    """Autograd nodes of these tensors."""
    noise: bool = False
    """Whether its output is disturbed."""


def probe(model: nn.Module, name: str, *, new: bool) -> tuple[str, ...]:
    """Runs the model on a few tokens with adapter `name` alone and looks at every adapted module.

    Args:
        new: the adapter has its starting values; that its modules are called is all that is asked.

    Returns:
        Notes: what could not be tried, in words.

    Raises:
        AdapterError: modules that the adapter does not act on, with the reason.
    """
    watched = [
        _Watched(module, wrapper)
        for found in (adapted_layers(model), replaced_modules(model))
        for module, wrapper in found.items()
        if name in wrapper.adapters
    ]
    if any(p.is_meta for p in model.parameters()):
        return ()
    with ExitStack() as stack:
        stack.enter_context(routed(Routing(((name, 1.0),))))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_eager())
        for one in watched:
            stack.enter_context(_watching(one, name))
        ran, result, failure = _run(model)
        notes = [f"the adapter was not tried in a whole pass: {failure}"] if failure else []
        idle = [one for one in watched if not one.calls and not one.inner]
        acting = {id(one) for one in watched if new or _acts(one.wrapper, name)}
        modules = dict(base_modules(model)) if idle and ran else {}
        around = [o for o in idle if ran and id(o) in acting and _owner_ran(modules, o, ran)]
        past = [one for one in watched if one.inner > one.calls]
        dead = [] if new or result is None else _dead(model, watched, result)
        skipped = [one for one in idle if one not in around]
        for one in skipped:
            _try_alone(one)
    if ran and skipped:
        more = f" (and {len(skipped) - 1} more)" if skipped[1:] else ""
        notes.append(f"not used by a short text, tried apart: {skipped[0].module}{more}")
    _refuse(
        name,
        len(watched),
        {
            "the model goes around it: its owner ran and never called it": around,
            "the model calls its base layer past the adapter": past,
            "its output does not reach the model's result": [d for d in dead if id(d) in acting],
        },
        [f"{one.module}: {one.wrong}" for one in watched if one.wrong],
    )
    return tuple(notes)


def _refuse(
    name: str, total: int, kinds: dict[str, list[_Watched]], inexact: Sequence[str]
) -> None:
    lines = {reason: [f"{o.module}: {reason}" for o in found] for reason, found in kinds.items()}
    lines["inexact"] = list(inexact)
    bad = {line.partition(":")[0] for found in lines.values() for line in found}
    if bad:
        raise AdapterError(
            f"adapter `{name}` does not act on {len(bad)} of {total} modules",
            details=[first_of(found) for found in lines.values() if found],
            hint="leave these modules out of target_modules and modules_to_save,"
            " or load the model without what replaces or fuses its layers",
        )


# --- the pass ---------------------------------------------------------------------------------


def _run(model: Any) -> tuple[set[int], Tensor | None, str | None]:
    """(ids of the modules that ran, the result, why there is none)."""
    ids = _token_ids(model)
    if ids is None:
        return set(), None, None
    given = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    ran: set[int] = set()
    hook = register_module_forward_pre_hook(lambda module, _: ran.add(id(module)))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            output = model(**given)
    except Exception as error:  # whatever code of the model's own raises for so short an input
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return set(), None, f"{type(error).__name__}: {reason}"
    finally:
        hook.remove()
    return ran, _result(output), None


def _token_ids(model: Any) -> Tensor | None:
    """[1, TOKENS] ids on the embedding's device; None for a model that takes no tokens."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    try:
        embedding = unwrapped(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, nn.Embedding):
        return None
    rows = embedding.num_embeddings
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(rows, (1, TOKENS), generator=generator, device="cpu")
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids[ids == (-1 if pad is None else pad)] = (0 if pad is None else pad + 1) % rows
    return ids.to(embedding.weight.device)


def _result(output: Any) -> Tensor | None:
    found = getattr(output, "logits", None)
    if found is None and not isinstance(output, Tensor):
        found = output[0] if len(output) else None
    elif found is None:
        found = output
    return found if isinstance(found, Tensor) else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout of the base's own, and every module afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _eager() -> AbstractContextManager[Any]:
    """Compiled parts run as they are written: compiling again for one pass takes minutes."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    found: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return found


@contextmanager
def _watching(one: _Watched, name: str) -> Iterator[None]:
    """Counts the calls of a wrapper and holds its output against the factors.

    `forward` is watched on the object: some code calls it directly, and a replaced one is there.
    """
    wrapper, own = one.wrapper, one.wrapper.__dict__.get("forward")
    forward = wrapper.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        one.calls += 1
        one.y_base = None
        y = forward(*args, **kwargs)
        if not isinstance(y, Tensor):
            return y
        one.outputs += 1
        one.nodes |= {y.grad_fn} - {None}
        if isinstance(wrapper, AdaptedLayer) and one.wrong is None:
            x = args[0] if args else next(iter(kwargs.values()))
            one.wrong = _deviation(wrapper.base, lora_of(wrapper, name), x, one.y_base, y)
        if one.noise:
            generator = torch.Generator(y.device).manual_seed(0)
            noise = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
            return y.detach() + noise * (1 + y.detach().abs().max())
        return y

    def kept(_module: nn.Module, _args: Any, y: Any) -> None:
        one.inner += 1
        if isinstance(wrapper, AdaptedLayer):  # the adapter adds in y's own memory
            one.y_base = y.detach().clone()

    wrapper.__dict__["forward"] = seen
    hook = wrapper.base_layer.register_forward_hook(kept)
    try:
        yield
    finally:
        hook.remove()
        del wrapper.__dict__["forward"]
        if own is not None:
            wrapper.__dict__["forward"] = own


# --- what is asked of a wrapper ---------------------------------------------------------------


@torch.no_grad()
def _deviation(
    base: BaseLayer, lora: Lora, x: Tensor, y_base: Tensor | None, y: Tensor
) -> str | None:
    """How the output differs from the base's plus what the factors say; None if it does not.

    The bound is one of elements: where the base's output is near zero even a small delta shows.
    Rounding is relative to the terms of a sum and not to the sum, which they may cancel in.
    """
    if y_base is None:
        return "its base layer did not run"
    wide = torch.promote_types(y.dtype, torch.float32)
    delta, terms = _delta(base, lora, x, wide)
    found = y.to(wide) - y_base.to(wide)
    relative = max(_TOLERANCE * torch.finfo(y.dtype).eps, _LEAST)
    room = relative * (y_base.abs().to(wide) + delta.abs() + terms)
    if not bool(((found - delta).abs() > room).any()):
        return None
    size = float(delta.square().sum())
    if size == 0:
        return "its B is zero, and its output is not the base's"
    share = float((found * delta).sum()) / size
    return f"its output moves by {share:.2f} times what its factors say"


def _delta(base: BaseLayer, lora: Lora, x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale * B A x + shift, and the root of the summed squares of its terms."""
    A, B, scale = lora.A.to(wide), lora.B.to(wide), abs(lora.scale)
    if base.kind == "embedding":
        embedding: Any = base
        z = A.t()[x] * embedding.gain
        z_terms = z.square()
    else:
        x = x.to(wide)
        z = x @ A.t()
        z_terms = z.square() + x.square() @ A.square().t()
    delta = lora.scale * (z @ B.t())
    terms = scale * (z_terms @ B.square().t()).sqrt()
    shift = lora.shift(base.bias)
    if shift is None:
        return delta, terms
    return delta + shift.to(wide), terms + shift.to(wide).abs()


@torch.no_grad()
def _acts(wrapper: AdaptedLayer | ReplacedModule, name: str) -> bool:
    """Whether the adapter changes anything here: a trained one may have a B of zeros."""
    if isinstance(wrapper, ReplacedModule):
        return True
    lora = lora_of(wrapper, name)
    shift = lora.shift(wrapper.base.bias)
    return bool(lora.B.any()) or (shift is not None and bool(shift.any()))


def _owner_ran(modules: Mapping[str, nn.Module], one: _Watched, ran: set[int]) -> bool:
    """Whether the module that should have called this one ran; elements of a list may take turns.

    The owner is the nearest module above that has a forward; wrappers in between count as it.
    """
    parts = one.module.split(".")
    for length in range(len(parts) - 1, -1, -1):
        owner = modules[".".join(parts[:length])]
        if type(owner).forward is not nn.Module.forward:
            return id(owner) in ran
        if any(id(module) in ran for module in owner.modules()):
            return False  # others of the same list ran: this one is chosen at times
    return False


def _dead(model: nn.Module, watched: Sequence[_Watched], result: Tensor) -> list[_Watched]:
    """Those that ran and that the result does not depend on."""
    reached = _behind(result)
    suspects = [one for one in watched if one.outputs and reached.isdisjoint(one.nodes)]
    if not suspects or _same_with_noise(model, suspects, result):
        return suspects
    return [one for one in suspects if _same_with_noise(model, [one], result)]


def _same_with_noise(model: nn.Module, some: Sequence[_Watched], result: Tensor) -> bool:
    for one in some:
        one.noise = True
    _, found, _ = _run(model)
    for one in some:
        one.noise = False
    return found is not None and torch.equal(found, result)


def _behind(result: Tensor) -> set[Any]:
    """All autograd nodes that a tensor was computed by."""
    found: set[Any] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found


@torch.no_grad()
def _try_alone(one: _Watched) -> None:
    """Runs a wrapper that no pass has reached on random rows; its watch compares."""
    wrapper = one.wrapper
    if isinstance(wrapper, ReplacedModule):
        return
    layer: Any = wrapper.base_layer
    generator = torch.Generator().manual_seed(0)
    device = next(layer.parameters()).device
    columns = wrapper.base.shape[1]
    if wrapper.base.kind == "embedding":
        wrapper(torch.randint(columns, (TOKENS,), generator=generator).to(device))
        return
    dtype = getattr(layer, "compute_dtype", None) or wrapper.base.weight().dtype
    wrapper(torch.randn(TOKENS, columns, generator=generator).to(device, dtype))

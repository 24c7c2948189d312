from __future__ import annotations

import torch

from decal.adapters.init import module_generator, start_values


def start(how: object, seed: int = 0, module: str = "m", r: int = 6) -> tuple:
    return start_values((301, 203), r, how, module_generator(seed, module))  # type: ignore[arg-type]


def test_kaiming_uniform_by_fan_in() -> None:
    """Bound 1/sqrt(in), variance bound^2 / 3 within 5 standard errors. Mutation: fan-out."""
    A, B = start(True, r=64)
    bound = 203**-0.5
    assert A.shape == (64, 203)
    assert A.dtype == torch.float32
    assert 0.99 * bound < A.abs().max().item() <= bound
    assert abs(A.var().item() / (bound**2 / 3) - 1) < 5 * (0.8 / A.numel()) ** 0.5
    assert B.shape == (301, 64)
    assert not B.any()


def test_gaussian_has_deviation_one_over_r() -> None:
    """Within 5 standard errors. Mutation: deviation 1/sqrt(r)."""
    A, B = start("gaussian", r=12)
    assert abs(A.std().item() * 12 - 1) < 5 * (0.5 / A.numel()) ** 0.5
    assert not B.any()


def test_false_starts_with_a_delta() -> None:
    A, B = start(False)
    assert A.any()
    assert B.any()
    assert B.abs().max().item() <= 6**-0.5


def test_a_layer_depends_on_seed_and_name_only() -> None:
    """Mutation: one generator for all layers, or torch's global one."""
    first, _ = start(True)
    torch.rand(5)
    assert torch.equal(start(True)[0], first)
    assert not torch.equal(start(True, seed=1)[0], first)
    assert not torch.equal(start(True, module="n")[0], first)


def test_masters_are_float32_on_the_cpu_whatever_the_defaults() -> None:
    """Fails when torch's default dtype or device decides."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = [
                t
                for how in (True, False, "gaussian")
                for kind in ("linear", "embedding")
                for t in start_values((5, 7), 3, how, module_generator(0, "m"), kind)
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(t.dtype, t.device.type) for t in found} == {(torch.float32, "cpu")}

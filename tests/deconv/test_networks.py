"""Gx and Gk are the paper's networks, and their rewrites change nothing but rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.networks import Gk, GkVector, Gx, VectorAdam


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zk(size: int = 7) -> Tensor:
    return torch.from_numpy(gaussian(2.0 * FWHM_PER_SIGMA, 1.0, (size,) * 3))


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_gx_has_the_published_number_of_parameters():
    """0.97 million: channels 80, 60, 40 down, 60, 50, 40 up, 64 in every skip."""
    assert round(count(Gx(seeded(), output_scale=1.5)) / 1e6, 2) == 0.97


def test_gk_has_the_published_number_of_parameters():
    """n -> 5n -> n: 10 n² + 6 n, which is 113.9 million for the paper's 3375 voxels."""
    n = 27
    assert count(Gk(zk(3), seeded())) == 10 * n * n + 6 * n
    assert round((10 * 3375**2 + 6 * 3375) / 1e6, 1) == 113.9


@pytest.mark.parametrize("tail", ["pointwise", "spatial"])
@pytest.mark.parametrize("shape", [(8, 16, 24), (5, 9, 18)])
def test_gx_doubles_any_shape_and_stays_in_range(shape, tail):
    """x lies on the doubled grid and in (0, s), for odd and uneven sizes too."""
    x = Gx(seeded(), output_scale=1.1, tail=tail)(torch.rand((1, 1, *shape), generator=seeded()))
    assert x.shape[-3:] == tuple(2 * n for n in shape)
    assert float(x.detach().min()) > 0 and float(x.detach().max()) < 1.1


def test_an_unknown_tail_is_refused():
    """A misspelt tail must not quietly become another."""
    with pytest.raises(ValueError, match="tail"):
        Gx(seeded(), output_scale=1.0, tail="none")  # type: ignore[arg-type]


def test_parameters_come_from_the_generator_alone():
    """Same seed, same network; the global random state is neither read nor moved."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, gk = Gx(seeded(3), output_scale=1.5), Gk(zk(), seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, again = Gx(seeded(3), output_scale=1.5), Gk(zk(), seeded(3))
    for a, b in zip([*first.parameters(), *gk.parameters()], [*second.parameters(), *again.parameters()], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.tail_last.weight, Gx(seeded(4), output_scale=1.5).tail_last.weight)


def test_the_early_tail_is_exact_with_its_gradients():
    """1x1x1 convolution and linear interpolation commute, for the image and for every parameter's gradient."""
    z = torch.rand((1, 1, 8, 10, 12), generator=seeded())
    weights = torch.rand((1, 1, 16, 20, 24), generator=seeded(1))
    results = []
    for early in (False, True):
        gx = Gx(seeded(5), output_scale=1.5, early_tail=early).double()
        x = gx(z.double())
        (x * weights).sum().backward()
        results.append((x.detach(), [p.grad for p in gx.parameters()]))
    (x_late, late), (x_early, early_grads) = results
    assert torch.allclose(x_late, x_early, atol=1e-6)
    for a, b in zip(late, early_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()) + 1e-12)  # biases before a norm: 0


def test_a_kernel_is_positive_and_sums_to_one():
    """The softmax keeps equation 3 of the paper at any point of the optimisation."""
    for form in (Gk, GkVector):
        k = form(zk(), seeded())().detach()
        assert k.shape == (7, 7, 7) and float(k.min()) > 0 and float(k.sum()) == pytest.approx(1.0, rel=1e-5)


def descend(network: torch.nn.Module, step, steps: int, target: Tensor) -> list[Tensor]:
    kernels = []
    for _ in range(steps):
        network.zero_grad(set_to_none=True)
        k = network()
        (k - target).square().sum().backward()
        step()
        kernels.append(k.detach().clone())
    return kernels


@pytest.mark.parametrize("widened", [False, True])
def test_gk_as_a_vector_takes_the_same_adam_steps(widened):
    """First layer, its Adam update with epsilon, and the units dead at the start: the same kernels, step after step."""
    z = zk() if not widened else zk() ** 3 / (zk() ** 3).sum()  # a peaked zk, where most voxels meet epsilon
    target = torch.from_numpy(gaussian(3.0, 1.0, (7, 7, 7)))
    full = Gk(z, seeded(1))
    adam = torch.optim.Adam(full.parameters(), lr=8e-4)
    reference = descend(full, adam.step, 40, target)
    vector = GkVector(z, seeded(1))
    own = VectorAdam(vector.hidden, vector.zk, lr=8e-4)
    rest = torch.optim.Adam([vector.out_weight, vector.out_bias], lr=8e-4)

    def both() -> None:
        own.step()
        rest.step()

    rewritten = descend(vector, both, 40, target)
    assert float((reference[-1] - reference[0]).abs().max()) > 0.02  # they did move
    for a, b in zip(reference, rewritten, strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-6)


def test_units_dead_at_the_start_never_wake():
    """Why they may be left out: Adam never moves a weight that has no gradient."""
    full = Gk(zk(), seeded(1))
    dead = full.hidden(full.zk) <= 0
    before = full.hidden.weight[dead].clone()
    adam = torch.optim.Adam(full.parameters(), lr=1e-2)
    descend(full, adam.step, 20, torch.from_numpy(gaussian(3.0, 1.0, (7, 7, 7))))
    assert dead.any()
    assert torch.equal(full.hidden.weight[dead], before)


def test_the_vector_form_holds_a_quarter_of_the_parameters():
    """No first layer, half the columns of the second."""
    assert count(GkVector(zk(), seeded())) < 0.3 * count(Gk(zk(), seeded()))


def test_f_is_interpolated_to_rounding():
    """f(s) from the table equals the sum it stands for, over twelve decades."""
    z = zk()
    own = VectorAdam(torch.nn.Parameter(torch.zeros(3)), z, lr=1e-3)
    s = torch.logspace(-12, 0, 97, dtype=torch.float64)
    exact = torch.stack([(z.double() ** 2 / (value * z.double() + 1e-8)).sum() for value in s])
    assert torch.allclose(own._f(s), exact, rtol=1e-7)

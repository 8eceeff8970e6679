# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Flow matching to a normal target, where every distribution on the way is known in closed form.

The exact velocity is affine in x, so a denoising step maps normal distributions to normal ones:
mean and variance after any number of steps are computed, not sampled.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from torchrl_dvla import functional as F

MEAN, STD, LEVEL = 0.7, 0.3, 0.5


def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Mean of noise - action, given x_t = x, for actions from N(MEAN, STD)."""
    spread = time**2 + (1 - time) ** 2 * STD**2
    distance = (x - (1 - time) * MEAN) / spread
    return time * distance - (MEAN + (1 - time) * STD**2 * distance)


def ode_step(x, velocity, time, after, noise_level):
    return F.ode_step(x, velocity, time, after), torch.zeros_like(x)


STEPS = {"ode": ode_step, "sde": F.sde_step, "cps": F.cps_step}


def marginals(step: str, num_steps: int, first: int = 0) -> torch.Tensor:
    """Times, means and standard deviations before each step and after the last.

    Denoising starts before step ``first``, from the flow's own distribution there.
    """
    times = F.flow_time(torch.arange(first, num_steps + 1, dtype=torch.float64), num_steps)
    mean = (1 - times[0]) * MEAN
    variance = times[0] ** 2 + (1 - times[0]) ** 2 * STD**2
    found = [(times[0], mean, variance.sqrt())]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for time, after in itertools.pairwise(times):
        moved, std = STEPS[step](ends, velocity(ends, time), time, after, LEVEL)
        slope = moved[1] - moved[0]
        mean = moved[0] + slope * mean
        variance = slope**2 * variance + std.expand(2)[0] ** 2
        found.append((after, mean, variance.sqrt()))
    return torch.stack([torch.stack(entry) for entry in found], 1)


@pytest.mark.parametrize(
    ("step", "stds"),
    [
        ("ode", {4: 0.177, 10: 0.246, 100: 0.295, 1000: 0.299}),
        ("sde", {4: 0.238, 10: 0.271, 100: 0.298, 1000: 0.300}),
        ("cps", {4: 0.172, 10: 0.229, 100: 0.270, 1000: 0.276}),
    ],
)
def test_known_answers(step, stds):
    # What 200,000 samples of another implementation gave, to their error.
    for num_steps, std in stds.items():
        _, means, found = marginals(step, num_steps)
        assert found[-1].item() == pytest.approx(std, abs=1.5e-3)
        assert means[-1].item() == pytest.approx(MEAN, abs=1e-9)


@pytest.mark.parametrize("step", ["ode", "sde"])
def test_marginals_are_those_of_the_flow(step):
    # x_t = t noise + (1 - t) action has variance t^2 + (1 - t)^2 STD^2, at every time on the way.
    # From t = 0.9 on (at t = 1 the SDE is singular) the error of steps halves with their length.
    errors = []
    for num_steps in (1000, 2000):
        times, means, stds = marginals(step, num_steps, first=num_steps // 10)
        torch.testing.assert_close(means, (1 - times) * MEAN, atol=1e-3, rtol=0)
        exact = (times**2 + (1 - times) ** 2 * STD**2).sqrt()
        errors.append((stds - exact).abs().max().item())
    assert errors[0] < 1e-3
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_the_first_step_of_the_sde_widens_the_marginal():
    # Whatever K, it multiplies noise by 1 - LEVEL^2 / 2 and adds noise of deviation LEVEL: variance
    # 1 + LEVEL^4 / 4, which later steps take back (0.300 at the end of 1000).
    for num_steps in (10, 10_000):
        time, after = F.flow_time(torch.tensor([0, 1], dtype=torch.float64), num_steps)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        mean, std = F.sde_step(ends, torch.zeros(2), time, after, LEVEL)
        variance = (mean[1] - mean[0]) ** 2 + std**2
        assert variance.item() == pytest.approx(1 + LEVEL**4 / 4)


def test_cps_does_not_keep_the_marginals():
    narrow = [marginals("cps", num_steps)[2, -1].item() for num_steps in (1000, 4000)]
    assert narrow[1] < 0.28 and narrow[1] - narrow[0] < 1e-3  # of 0.3


def test_samples_have_the_computed_spread():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator)
    for i in range(10):
        time, after = F.flow_time(torch.tensor([i, i + 1]), 10)
        mean, std = F.sde_step(x, velocity(x, time), time, after, LEVEL)
        x = mean + std * torch.randn(x.shape, generator=generator)
    # five standard errors of mean and deviation of 50,000 samples
    assert x.mean().item() == pytest.approx(MEAN, abs=6e-3)
    assert x.std().item() == pytest.approx(marginals("sde", 10)[2, -1].item(), abs=4.5e-3)


def test_steps_by_hand():
    x, v = torch.tensor([2.0]), torch.tensor([4.0])
    time, after = torch.tensor([0.5]), torch.tensor([0.25])
    # x0 = 2 - 0.5 * 4 = 0, x1 = 2 + 0.5 * 4 = 4; Euler 2 - 0.25 * 4 = 1
    assert F.ode_step(x, v, time, after).item() == 1.0
    # sigma^2 = 0.25 * 0.5 / 0.5 = 0.25; 1 - 0.25 * 0.25 / (2 * 0.5) * 4 = 0.75; 0.5 * sqrt(0.25)
    mean, std = F.sde_step(x, v, time, after, 0.5)
    assert (mean.item(), std.item()) == (0.75, 0.25)
    # 0.75 * 0 + 0.25 * cos(pi / 4) * 4 = sqrt(0.5), 0.25 * sin(pi / 4)
    mean, std = F.cps_step(x, v, time, after, 0.5)
    assert mean.item() == pytest.approx(math.sqrt(0.5))
    assert std.item() == pytest.approx(0.25 * math.sqrt(0.5))
    # At t = 1, 1 - 0.75 takes the place of 1 - t: sigma^2 = 0.25 / 0.25 = 1;
    # 2 - 0.25 * 4 - 0.25 * 1 / 2 * 2 = 0.75, 1 * sqrt(0.25)
    mean, std = F.sde_step(x, v, torch.tensor([1.0]), torch.tensor([0.75]), 0.5)
    assert (mean.item(), std.item()) == (0.75, 0.5)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 10, 49])
@pytest.mark.parametrize("step", ["sde", "cps"])
def test_noise_level_zero_is_the_ode(step, num_steps):
    x, v = torch.randn(2, 64).unbind()
    for i in range(num_steps):
        time, after = F.flow_time(torch.tensor([i, i + 1]), num_steps)
        mean, std = STEPS[step](x, v, time, after, torch.zeros(()))
        torch.testing.assert_close(mean, F.ode_step(x, v, time, after))
        assert not std.any()


@pytest.mark.parametrize("num_steps", [1, 3, 4, 7, 10, 49])
def test_the_last_step_of_cps_has_no_density(num_steps):
    # 1 - (K - 1) / K - 1 / K is not always zero in floating point; a deviation of 1e-8 would give
    # log-probabilities of any size.
    time, after = F.flow_time(torch.tensor([num_steps - 1, num_steps]), num_steps)
    x, v = torch.randn(2, 64).unbind()
    mean, std = F.cps_step(x, v, time, after, LEVEL)
    torch.testing.assert_close(mean, x - time * v)
    assert not F.transition_log_prob(x, mean, std).any()


@pytest.mark.parametrize("step", ["sde", "cps"])
@pytest.mark.parametrize("i", [0, 2])
def test_gradients_of_log_probs_are_finite_differences(step, i):
    generator = torch.Generator().manual_seed(0)
    x, v, taken = torch.randn(3, 5, dtype=torch.float64, generator=generator).unbind()
    time, after = F.flow_time(torch.tensor([i, i + 1], dtype=torch.float64), 4)

    def log_prob(x, v):
        mean, std = STEPS[step](x, v, time, after, LEVEL)
        return F.transition_log_prob(taken, mean, std)

    assert torch.autograd.gradcheck(log_prob, (x.requires_grad_(), v.requires_grad_()))


def test_gradients_of_a_learned_deviation_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    raw, mean, taken = torch.randn(3, 5, dtype=torch.float64, generator=generator).unbind()

    def outputs(raw, mean):
        std = F.bounded_std(raw)
        return F.transition_log_prob(taken, mean, std), F.transition_entropy(std)

    assert torch.autograd.gradcheck(outputs, (raw.requires_grad_(), mean.requires_grad_()))
    log_variance = 2 * F.bounded_std(raw).log()
    between = torch.tensor([0.08, 0.16], dtype=torch.float64).square().log()
    expected = between[0] + (between[1] - between[0]) * (raw.tanh() + 1) / 2
    torch.testing.assert_close(log_variance, expected)


def test_log_prob_and_entropy_are_those_of_a_normal_distribution():
    x, mean, std = torch.randn(4), torch.randn(4), torch.rand(4) + 0.1
    torch.testing.assert_close(F.transition_log_prob(x, mean, std), Normal(mean, std).log_prob(x))
    torch.testing.assert_close(F.transition_entropy(std), Normal(mean, std).entropy())


def test_deterministic_steps_pass_no_gradient():
    mean, std = torch.tensor([0.0, 1.0]).requires_grad_(), torch.tensor([0.0, 2.0]).requires_grad_()
    log_prob = F.transition_log_prob(torch.tensor([5.0, 3.0]), mean, std)
    (log_prob.sum() + F.transition_entropy(std).sum()).backward()
    # at x - mean = 2, std 2: 2 / 4 for the mean, 2^2 / 2^3 - 1 / 2 + 1 / 2 for the deviation
    assert mean.grad.tolist() == [0.0, 0.5]
    assert std.grad.tolist() == [0.0, 0.5]


def test_flow_matching_learns_the_velocity():
    """The target's mean, given x_t, is the velocity that the known answers integrate."""
    generator = torch.Generator().manual_seed(0)
    action = MEAN + STD * torch.randn(400_000, generator=generator)
    noise, time = torch.randn(400_000, generator=generator), torch.tensor(0.6)
    x, target = F.flow_matching_pair(action, noise, time)
    design = torch.stack([x, torch.ones_like(x)], 1)
    slope, offset = torch.linalg.lstsq(design, target).solution
    ends = velocity(torch.tensor([0.0, 1.0]), time)
    assert offset.item() == pytest.approx(ends[0].item(), abs=5e-3)
    assert (slope + offset).item() == pytest.approx(ends[1].item(), abs=5e-3)

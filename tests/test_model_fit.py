"""What the model learns, against closed forms: a linear-Gaussian system and mazes."""

from __future__ import annotations

import time

import pytest
import torch
from model_data import make_maze
from tensordict import TensorDict
from torch.distributions import Normal
from torchrl.data import (
    Categorical as CategoricalSpec,
)
from torchrl.data import MultiCategorical, Unbounded

from torchrl_recall import BacktrackLoss, BacktrackModel
from torchrl_recall.diagnostics import tabular_kernel
from torchrl_recall.envs import (
    FourRoomsEnv,
    backtrack_kernel,
    exact_backtrack_model,
    kernel_divergence,
)

F64 = torch.float64
UNIFORM = torch.full((25, 4), 0.25)


def fit(model, batches, learning_rate):
    """Minimise the loss over ``batches``, the learning rate falling to zero by a cosine."""
    batches = list(batches)
    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        value = loss(batch)["loss_backtrack"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model


class LinearGaussian:
    """``x' = a x + b u + noise`` with ``u ~ N(k x, s_u²)`` and ``x ~ N(0, s_x²)``."""

    a, b, k, s_x, s_u, s_noise = 0.9, 0.5, -0.6, 1.5, 0.8, 0.3

    def transitions(self, n, generator):
        noise = torch.randn(3, n, 1, generator=generator)
        x = self.s_x * noise[0]
        u = self.k * x + self.s_u * noise[1]
        after = self.a * x + self.b * u + self.s_noise * noise[2]
        return TensorDict({"observation": x, "action": u, "next": {"observation": after}}, [n])

    def covariance(self):
        """Of (x, u, x'), all of them linear in the three noises."""
        x = torch.tensor([self.s_x, 0.0, 0.0], dtype=F64)
        u = self.k * x + torch.tensor([0.0, self.s_u, 0.0])
        after = self.a * x + self.b * u + torch.tensor([0.0, 0.0, self.s_noise])
        rows = torch.stack([x, u, after])
        return rows @ rows.T

    def condition(self, target, given):
        """Gain and standard deviation of a variable given others."""
        c = self.covariance()
        gain = torch.linalg.solve(c[given][:, given], c[given, target])
        return gain, (c[target, target] - gain @ c[given, target]).sqrt()


def moments(log_density, grid):
    """Mass, mean and standard deviation of densities ``[*B, n]`` on an even grid ``[n]``."""
    weight = log_density.double().exp() * (grid[1] - grid[0])
    mass = weight.sum(-1)
    mean = (weight * grid).sum(-1) / mass
    variance = (weight * (grid - mean.unsqueeze(-1)).square()).sum(-1) / mass
    return mass, mean, variance.sqrt()


def divergence(exact, log_density, grid):
    """``KL(exact || model)`` on an even grid."""
    log_exact = exact.log_prob(grid)
    return (log_exact.exp() * (log_exact - log_density)).sum(-1) * (grid[1] - grid[0])


@pytest.fixture(scope="module")
def linear_gaussian():
    system = LinearGaussian()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = BacktrackModel(1, Unbounded((1,)), num_cells=(16,))
    batches = (system.transitions(2048, generator) for _ in range(1200))
    return system, fit(model, batches, learning_rate=1e-2)


# Within two standard deviations of what is given, in units of the exact scale (twice for the
# change, which has two inputs).
MEAN_TOLERANCE, SCALE_TOLERANCE, DIVERGENCE_TOLERANCE = 0.05, 0.03, 0.002


@torch.no_grad()
def test_learns_the_action_posterior_of_a_linear_gaussian_system(linear_gaussian):
    system, model = linear_gaussian
    gain, std = system.condition(1, [2])
    after = torch.linspace(-2, 2, 9, dtype=F64) * system.covariance()[2, 2].sqrt()
    grid = torch.linspace(-12, 12, 2401, dtype=F64)
    # What the model says of every action at every next state; the predecessor does not matter.
    data = TensorDict(
        {
            "observation": torch.zeros(9, 2401, 1),
            "action": grid.float().view(1, -1, 1).expand(9, -1, 1),
            "next": {"observation": after.float().view(-1, 1, 1).expand(9, 2401, 1)},
        },
        [9, 2401],
    )
    log_density = model(data)["backtrack", "action_log_prob"].double()
    mass, mean, scale = moments(log_density, grid)
    torch.testing.assert_close(mass, torch.ones(9, dtype=F64), rtol=0, atol=1e-3)
    assert bool(((mean - gain * after).abs() < MEAN_TOLERANCE * std).all())
    assert bool(((scale / std - 1).abs() < SCALE_TOLERANCE).all())
    exact = Normal((gain * after).unsqueeze(-1), std)
    assert bool((divergence(exact, log_density, grid) < DIVERGENCE_TOLERANCE).all())


@torch.no_grad()
def test_learns_the_change_posterior_of_a_linear_gaussian_system(linear_gaussian):
    system, model = linear_gaussian
    gain, std = system.condition(0, [1, 2])
    action_gain, action_std = system.condition(1, [2])
    after = torch.linspace(-2, 2, 5, dtype=F64) * system.covariance()[2, 2].sqrt()
    # Actions that do occur with such a next state.
    action = action_gain * after + torch.linspace(-2, 2, 5, dtype=F64).unsqueeze(-1) * action_std
    after = after.expand(5, 5)
    grid = torch.linspace(-8, 8, 3201, dtype=F64)
    shape = (5, 5, 3201, 1)
    data = TensorDict(
        {
            "observation": grid.float().view(1, 1, -1, 1).expand(shape),
            "action": action.float().view(5, 5, 1, 1).expand(shape),
            "next": {"observation": after.float().view(5, 5, 1, 1).expand(shape)},
        },
        shape[:-1],
    )
    log_density = model(data)["backtrack", "delta_log_prob"].double()
    mass, mean, scale = moments(log_density, grid)
    # The change's density is the predecessor's, shifted.
    expected = gain[0] * action + gain[1] * after
    torch.testing.assert_close(mass, torch.ones(5, 5, dtype=F64), rtol=0, atol=1e-3)
    assert bool(((mean - expected).abs() < 2 * MEAN_TOLERANCE * std).all())
    assert bool(((scale / std - 1).abs() < 2 * SCALE_TOLERANCE).all())
    exact = Normal(expected.unsqueeze(-1), std)
    assert bool((divergence(exact, log_density, grid) < 2 * DIVERGENCE_TOLERANCE).all())


def whole_episodes(env, count):
    """The steps of the first ``count`` episodes of each maze under a uniform policy.

    Whoever takes what has ended by some time takes too many short episodes; these are all whole.
    """
    data, steps, ended = env.reset(), [], torch.zeros(env.batch_size, dtype=torch.int64)
    while bool((ended < count).any()):
        step, data = env.step_and_maybe_reset(env.rand_action(data))
        keys = ("observation", "action", "is_init", ("next", "observation"))
        steps.append(step.select(*keys)[ended < count])
        ended += step["next", "done"].squeeze(-1)
    return torch.cat(steps)


@pytest.fixture(scope="module")
def learned_maze():
    """A model fitted to 5000 episodes of a uniform policy, and the seconds that took."""
    torch.manual_seed(0)
    started = time.process_time()
    env = make_maze(batch_size=(1000,))
    data = whole_episodes(env, 5)
    assert int(data["is_init"].sum()) == 5000
    model = BacktrackModel.from_env(env, num_cells=(64, 64))
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.randint(len(data), (1024,), generator=generator) for _ in range(800))
    fit(model, (data[index] for index in chosen), learning_rate=1e-2)
    return model, time.process_time() - started


def test_learns_the_exact_posterior_of_a_maze(learned_maze):
    model, seconds = learned_maze
    env = FourRoomsEnv(5, slip=0.1, max_steps=None)
    exact = backtrack_kernel(env, UNIFORM)
    found = kernel_divergence(exact, *tabular_kernel(model, env))
    print(f"KL {found.per_step:.5f} a step, {found.trajectory:.4f} a trajectory, {seconds:.1f} s")
    # A thousand mazes of 32 steps each, and a stop at every start: nothing else gets this low.
    assert 0 <= float(found.per_step) < 0.005
    assert 0 <= float(found.trajectory) < 0.1


@pytest.mark.parametrize("size", [5, 7])
@pytest.mark.parametrize("start", ["fixed", "any"])
@pytest.mark.parametrize("slip", [0.0, 0.2])
def test_the_exact_model_is_exact(size, start, slip):
    env = FourRoomsEnv(size, slip=slip, start=start, max_steps=None)
    torch.manual_seed(0)
    policy = torch.softmax(torch.randn(size**2, 4, dtype=F64), -1)
    model, exact = exact_backtrack_model(env, policy), backtrack_kernel(env, policy)
    stop, predecessor = tabular_kernel(model, env)
    found = kernel_divergence(exact, stop, predecessor)
    assert abs(float(found.per_step)) < 1e-6
    visited = exact.visits > 0
    assert bool(visited.any())
    torch.testing.assert_close(stop[visited], exact.stop[visited], rtol=1e-5, atol=1e-6)
    inner = visited & (exact.stop < 1)
    torch.testing.assert_close(predecessor[inner], exact.predecessor[inner], rtol=1e-5, atol=1e-6)


def test_a_tabulated_kernel_sums_to_one_and_is_log_prob():
    env = make_maze()
    torch.manual_seed(0)
    model = BacktrackModel.from_env(env, num_cells=(8,))
    stop, predecessor = tabular_kernel(model, env)
    torch.testing.assert_close(predecessor.sum((1, 2)), torch.ones(25, dtype=F64))
    data = env.rollout(30)
    cell, after = (data[key] @ torch.tensor([5, 1]) for key in model.in_keys[1::-1])
    expected = (1 - stop[after]) * predecessor[after, data["action"], cell]
    torch.testing.assert_close(model.log_prob(data).exp().double(), expected, rtol=1e-4, atol=1e-6)


def test_tabular_kernels_without_stop_or_support():
    env = FourRoomsEnv(5)
    model = BacktrackModel(MultiCategorical([5, 5]), CategoricalSpec(4), num_cells=(8,))
    stop, predecessor = tabular_kernel(model, env)
    assert not bool(stop.any())
    torch.testing.assert_close(predecessor.sum((1, 2)), torch.ones(25, dtype=F64))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (torch.nn.Linear(2, 2), TypeError, "model must be a BacktrackModel, got Linear"),
        (BacktrackModel(2, CategoricalSpec(4)), ValueError, "model has observations of no classes"),
        (BacktrackModel(MultiCategorical([5, 7]), CategoricalSpec(4)), ValueError, r"\[5, 7\]"),
        (BacktrackModel(MultiCategorical([5, 5]), CategoricalSpec(3)), ValueError, "4 moves"),
        (BacktrackModel(MultiCategorical([5, 5]), 4), ValueError, "TanhNormalHead"),
    ],
)
def test_tabular_kernel_refuses_by_name(model, error, message):
    with pytest.raises(error, match=message):
        tabular_kernel(model, FourRoomsEnv(5))

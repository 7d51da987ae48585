"""The noise of the C kernel as random numbers: moments, independence and tails up to 5 sigma.

Networks of zeros make the action and the change pure noise of a known scale. Every test has a
fixed seed and an error rate of about 1e-4 or less.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torchrl.data import Categorical, MultiCategorical, Unbounded

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import native

pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)
ROWS, STEPS, SIZE = 4096, 16, 9
# A normal deviate beyond this has a probability of 6e-5, both sides together.
LIMIT = 4.0


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.fixture(scope="module")
def normals():
    """Noise ``[rows, steps, 2 * size]`` in float64: of the action, then of the change."""
    model = zeroed(BacktrackModel(SIZE, Unbounded((SIZE,)), num_cells=()))
    plan = native.plan_of(model)
    columns = native.walk(plan, torch.zeros(ROWS, SIZE), 1, STEPS, seed=2**55 + 7)
    # sigmoid(0) = 1/2: the log-scales are the middles of their ranges.
    action = columns.action.double() / math.exp((-5 + 2) / 2)
    delta = (columns.state.double() - columns.next_state.double()) / math.exp((-6 + 2) / 2)
    return torch.cat([action, delta], -1)


def test_moments(normals):
    n = normals.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        deviate = (normals.pow(power).mean() - mean) / math.sqrt(variance / n)
        assert abs(float(deviate)) < LIMIT, power


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_neighbours_are_independent(normals, dimension):
    size = normals.shape[dimension]
    for lag in (1, 2, 3, 4, 8):
        one = normals.narrow(dimension, 0, size - lag)
        other = normals.narrow(dimension, lag, size - lag)
        for f in (lambda x: x, lambda x: (x.square() - 1) / math.sqrt(2)):
            deviate = (f(one) * f(other)).mean() * math.sqrt(one.numel())
            assert abs(float(deviate)) < LIMIT, lag


def test_features_are_uncorrelated(normals):
    flat = normals.flatten(0, 1)
    correlation = torch.corrcoef(flat.T) - torch.eye(2 * SIZE, dtype=torch.float64)
    # The largest of 153 pairs.
    assert float(correlation.abs().max()) * math.sqrt(len(flat)) < 5


def test_distribution_and_tails(normals):
    flat = normals.flatten()
    assert stats.kstest(flat[::7].numpy(), "norm").pvalue > 1e-4
    for limit in (1.0, 2.0, 3.0, 4.0, 4.5, 5.0):
        for tail in (flat, -flat):
            found = int((tail > limit).sum())
            low, high = stats.binom.interval(1 - 1e-5, flat.numel(), stats.norm.sf(limit))
            assert low <= found <= high, (limit, found)
    assert 4.5 < float(flat.abs().max()) < 6.7


def test_radius_and_angle_are_independent(normals):
    pairs = normals[..., :8].unflatten(-1, (4, 2)).flatten(0, 2)
    radius = pairs.square().sum(-1)
    angle = torch.atan2(pairs[:, 1], pairs[:, 0])
    assert stats.kstest(radius[::3].numpy(), stats.chi2(2).cdf).pvalue > 1e-4
    assert stats.kstest(angle[::3].numpy() / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-4
    for harmonic in (torch.cos(angle), torch.sin(2 * angle)):
        deviate = (harmonic * (radius - 2)).mean() * math.sqrt(len(radius)) / math.sqrt(2)
        assert abs(float(deviate)) < LIMIT


def test_classes_and_stops_are_drawn_by_their_probabilities():
    spec = MultiCategorical([3, 5])
    support = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    model = zeroed(BacktrackModel(spec, Categorical(4), delta_support=support, stop=True))
    with torch.no_grad():
        list(model.action_network)[-1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        list(model.delta_network)[-1].bias.copy_(torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log())
        list(model.stop_network)[-1].bias.fill_(-2.0)
    rows = 40_000
    trace = sample_traces(
        model,
        torch.tensor([[1, 2]]).expand(rows, -1),
        num_steps=2,
        generator=torch.Generator().manual_seed(11),
        backend="native",
    )
    last = trace[:, 1]
    action = last["action"].bincount(minlength=4)
    assert stats.chisquare(action, rows * torch.tensor([0.1, 0.2, 0.3, 0.4])).pvalue > 1e-4
    change = last["observation"] - last["next", "observation"]
    match = (change.unsqueeze(1) == support).all(-1).int().argmax(-1)
    joint = (last["action"] * 5 + match).bincount(minlength=20).reshape(4, 5)
    assert stats.chi2_contingency(joint).pvalue > 1e-4
    delta = joint.sum(0)
    share = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05])
    assert stats.chisquare(delta, rows * share).pvalue > 1e-4
    goes_on = 1 - float(torch.sigmoid(torch.tensor(-2.0)))
    kept = trace["collector", "mask"]
    assert stats.binomtest(int(kept[:, 1].sum()), rows, goes_on).pvalue > 1e-4
    assert stats.binomtest(int(kept[:, 0].sum()), int(kept[:, 1].sum()), goes_on).pvalue > 1e-4


def test_the_generator_alone_decides():
    model = BacktrackModel(3, 2, num_cells=(16,))
    start = torch.zeros(70, 3)

    def draw(generator):
        return sample_traces(model, start, num_steps=4, generator=generator)["observation"]

    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    first, second = draw(one), draw(one)
    assert torch.equal(first, draw(other))
    assert not torch.equal(first, second)
    state = one.get_state()
    third = draw(one)
    one.set_state(state)
    assert torch.equal(third, draw(one))
    torch.manual_seed(3)
    default = draw(None)
    torch.manual_seed(3)
    assert torch.equal(default, draw(None))
    # No number is used twice: not by rows, not by steps, not by calls.
    changes = torch.cat([(x[:, 1:] - x[:, :-1]).flatten() for x in (first, second, third)])
    assert len(changes.unique()) > 0.999 * len(changes)

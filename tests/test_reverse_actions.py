"""Uniform reverse actions, and the entropy of learned ones: closed forms and an exact optimum."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy import integrate, optimize, stats
from tensordict import TensorDict
from torch import distributions as laws
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from trace_data import (
    F32,
    F64,
    OBSERVATIONS,
    assert_same,
    make_model,
    make_noise,
    make_start,
    randn,
)

from torchrl_recall import BacktrackLoss, BacktrackModel, sample_traces
from torchrl_recall.model.heads import CategoricalHead, NormalHead, TanhNormalHead

# Sampling tests fail a correct sampler this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-4
UNIFORM = {"reverse_action": "uniform"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- uniform ----


def test_uniform_actions_of_a_box_are_uniform_and_say_so():
    model = BacktrackModel(3, Bounded(-2, 5, (2,)), num_cells=(8,), **UNIFORM)
    options = {"num_steps": 1, "num_traces": 20_000, "generator": seeded(), "backend": "eager"}
    trace = sample_traces(model, torch.randn(3), **options)
    for column in trace["action"][:, 0].T.numpy():
        assert stats.kstest(column, stats.uniform(-2, 7).cdf).pvalue > ERROR_RATE
    expected = torch.full((20_000, 1), -2 * math.log(7))
    torch.testing.assert_close(trace["action_log_prob"], expected)


@pytest.mark.parametrize("spec", [Categorical(4), OneHot(4)])
def test_uniform_classes_are_uniform_and_say_so(spec):
    model = BacktrackModel(3, spec, num_cells=(8,), **UNIFORM)
    options = {"num_steps": 1, "num_traces": 8000, "generator": seeded(), "backend": "eager"}
    trace = sample_traces(model, torch.randn(3), **options)
    action = trace["action"][:, 0]
    index = action if spec.shape == torch.Size([]) else action.long().argmax(-1)
    assert stats.chisquare(index.bincount(minlength=4).numpy()).pvalue > ERROR_RATE
    torch.testing.assert_close(trace["action_log_prob"], torch.full((8000, 1), -math.log(4)))


@pytest.mark.parametrize("action", ["tanh", "categorical"])
def test_uniform_actions_have_no_network_and_nothing_to_learn(action):
    model = make_model("normal", action, **UNIFORM)
    assert model.action_network is None
    assert not any("action_network" in name for name in model.state_dict())
    data = TensorDict({"observation": randn(6, 3), "next": {"observation": randn(6, 3)}}, [6])
    data["action"] = torch.arange(6) % 4 if action == "categorical" else randn(6, 2).tanh()
    out = BacktrackLoss(model)(data)
    volume = 4 if action == "categorical" else 7**2
    assert float(out["backtrack_action_log_prob"]) == pytest.approx(-math.log(volume))
    out["loss_backtrack"].backward()
    assert all(p.grad is not None for p in model.parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.log_prob(data), model.log_prob(data))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ["tanh", "categorical", "one_hot"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_backends_agree_to_rounding(observation, action, stop):
    model = make_model(observation, action, stop=stop, **UNIFORM)
    start, noise = make_start(model, 20), make_noise(model, 6, 20)
    options = {"num_steps": 6, "noise": noise}
    reference = sample_traces(model, start, **options, backend="reference")
    assert_same(reference, sample_traces(model, start, **options, backend="eager"), 1e-11)
    if model.observation.is_discrete and action != "tanh":
        assert_same(reference, sample_traces(model, start, **options, backend="table"), 1e-11)


def test_uniform_actions_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match=r"reverse_action is 'uniform', but .* unbounded"):
        BacktrackModel(3, Unbounded((2,)), **UNIFORM)
    with pytest.raises(ValueError, match=r"reverse_action must be one of .*, got 'random'"):
        BacktrackModel(3, 2, reverse_action="random")
    with pytest.raises(ValueError, match=r"action_entropy_coeff is 1.0, expected 0"):
        BacktrackLoss(BacktrackModel(3, 2, **UNIFORM), action_entropy_coeff=1.0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_extreme_noise_stays_in_the_box(dtype):
    head = BacktrackModel(3, Bounded(-2, 5, (1,), dtype=dtype), dtype=dtype, **UNIFORM).action.head
    noise = torch.tensor([[-40.0], [-5.0], [0.0], [5.0], [40.0]], dtype=dtype)
    value, _ = head.sample(noise.new_empty(5, 0), noise)
    assert bool(((value >= -2) & (value <= 5)).all())
    assert float(value[2]) == 1.5


# ---- entropy ----


def test_entropy_of_a_gaussian_is_torchs():
    head = NormalHead(3, (-2.0, 1.0), dtype=F64)
    head.normalizer.update(randn(40, 3) * torch.tensor([0.1, 1.0, 10.0]))
    parameters = randn(5, 6, seed=1)
    loc, log_scale = head.split(parameters)
    expected = laws.Normal(loc, log_scale.exp() * head.normalizer.std).entropy().sum(-1)
    torch.testing.assert_close(head.entropy(parameters), expected)


def test_entropy_of_classes_is_torchs():
    logits = randn(5, 4)
    expected = laws.Categorical(logits=logits).entropy()
    torch.testing.assert_close(CategoricalHead(4).entropy(logits), expected)


def test_entropy_of_a_squashed_gaussian_is_the_integral_on_average():
    head = TanhNormalHead(torch.tensor([-2.0]).double(), torch.tensor([5.0]).double(), (-2.0, 1.0))
    parameters = torch.tensor([0.4, 0.3], dtype=F64)

    def integrand(action):
        log_prob = float(head.log_prob(parameters, torch.tensor([action], dtype=F64)))
        return -math.exp(log_prob) * log_prob

    exact, _ = integrate.quad(integrand, -2, 5, limit=200)
    samples = head.entropy(parameters.expand(20_000, 2), randn(20_000, 1))
    deviation = float(samples.std()) / math.sqrt(20_000)
    assert abs(float(samples.mean()) - exact) < 4 * deviation
    with pytest.raises(ValueError, match="noise is None"):
        head.entropy(parameters)


def test_gradients_go_through_the_squashed_sample():
    """Of the entropy in the scale, against a difference of the integral's mean estimates."""
    head = TanhNormalHead(-torch.ones(1, dtype=F64), torch.ones(1, dtype=F64), (-2.0, 1.0))
    parameters = torch.tensor([0.2, -0.5], dtype=F64, requires_grad=True)
    noise = randn(2000, 1)
    head.entropy(parameters.expand(2000, 2), noise).mean().backward()
    with torch.no_grad():
        step = torch.tensor([0.0, 1e-5], dtype=F64)
        up, down = (
            head.entropy((parameters + sign * step).expand(2000, 2), noise).mean()
            for sign in (1, -1)
        )
    assert float(parameters.grad[1]) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


SHARE = 0.9


def two_actions(rows=200):
    """One state, reached by action 0 in nine cases of ten."""
    action = (torch.arange(rows) >= SHARE * rows).long()
    state = torch.zeros(rows, dtype=torch.int64)
    return TensorDict(
        {"observation": state, "action": action, "next": {"observation": state}}, [rows]
    )


def optimum(coeff):
    """The maximum of ``p log q + (1 - p) log(1 - q) + coeff * H(q)`` over q.

    Its derivative is ``p / q - (1 - p) / (1 - q) - coeff * log(q / (1 - q))``, which falls in q:
    there is one root, between 1/2 and p. (That of ``-KL(q || p) + coeff * H(q)`` would be
    ``q ∝ p^(1 / (1 + coeff))``; the likelihood is the other direction.)
    """
    if coeff == 0:
        return SHARE

    def slope(q):
        return SHARE / q - (1 - SHARE) / (1 - q) - coeff * math.log(q / (1 - q))

    return optimize.brentq(slope, 0.5, SHARE)


@pytest.mark.parametrize("coeff", [0.0, 0.3, 1.0, 10.0])
def test_a_maximum_entropy_fit_is_the_closed_optimum(coeff):
    model = BacktrackModel(Categorical(2), Categorical(2), num_cells=(), dtype=F64)
    loss = BacktrackLoss(model, action_entropy_coeff=coeff)
    optimizer = torch.optim.LBFGS(
        model.action_network.parameters(), line_search_fn="strong_wolfe", max_iter=60
    )
    data = two_actions()

    def closure():
        optimizer.zero_grad()
        value = loss(data)["loss_backtrack"]
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        share = model.action_parameters(torch.zeros(1, 1, dtype=torch.int64)).softmax(-1)[0, 0]
    print(f"coeff {coeff}: q {float(share):.6f}, optimum {optimum(coeff):.6f}")
    assert float(share) == pytest.approx(optimum(coeff), abs=1e-5)


def test_a_large_coefficient_makes_actions_even():
    # Near 1/2, q - 1/2 = (p - 1/2) / (1 + coeff): linearise the slope above.
    assert optimum(1000.0) - 0.5 == pytest.approx((SHARE - 0.5) / 1001, rel=1e-4)


@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("action", ["tanh", "normal", "categorical"])
def test_the_loss_is_less_by_the_entropy(action, num_members):
    model = make_model("normal", action, num_members=num_members)
    data = TensorDict({"observation": randn(6, 3), "next": {"observation": randn(6, 3)}}, [6])
    data["action"] = torch.arange(6) % 4 if action == "categorical" else randn(6, 2).tanh()
    plain = BacktrackLoss(model).eval()
    loss = BacktrackLoss(model, action_entropy_coeff=0.7, generator=seeded()).eval()
    out, before = loss(data), plain(data)
    entropy = out["backtrack_action_entropy"]
    assert not entropy.requires_grad
    expected = before["loss_backtrack"] - 0.7 * entropy
    torch.testing.assert_close(out["loss_backtrack"], expected)
    assert "backtrack_action_entropy" in loss.out_keys
    assert "backtrack_action_entropy" not in plain.out_keys
    assert "backtrack_action_entropy" not in before
    generator, each = seeded(), []
    for i in range(num_members):
        member, next_state = model.member(i), data["next", "observation"]
        noise = torch.randn(6, 2, generator=generator, dtype=F64) if action == "tanh" else None
        with torch.no_grad():
            each.append(model.action.head.entropy(member.action_parameters(next_state), noise))
    torch.testing.assert_close(entropy, torch.stack(each).mean())


def test_only_sampled_entropies_have_a_source_which_is_saved():
    data = TensorDict({"observation": randn(6, 3), "next": {"observation": randn(6, 3)}}, [6])
    data["action"] = randn(6, 2).tanh()
    model = make_model()
    assert not any("random" in name for name in BacktrackLoss(model).state_dict())
    closed = BacktrackLoss(make_model("normal", "normal"), action_entropy_coeff=1.0)
    assert not any("random" in name for name in closed.state_dict())
    loss = BacktrackLoss(model, action_entropy_coeff=1.0, generator=seeded()).eval()
    saved = copy.deepcopy(loss.state_dict())
    first = loss(data)["loss_backtrack"]
    assert loss(data)["loss_backtrack"] != first
    loss.load_state_dict(saved)
    assert loss(data)["loss_backtrack"] == first


@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), ("1", TypeError)])
def test_the_coefficient_is_checked(value, error):
    with pytest.raises(error, match="action_entropy_coeff must"):
        BacktrackLoss(make_model(), action_entropy_coeff=value)


@pytest.mark.parametrize("options", [UNIFORM, {}])
def test_losses_compile_in_one_graph(options):
    model = make_model("normal", "tanh", **options)
    data = TensorDict({"observation": randn(6, 3), "next": {"observation": randn(6, 3)}}, [6])
    data["action"] = randn(6, 2).tanh()
    loss = BacktrackLoss(model, action_entropy_coeff=0.0 if options else 0.5).eval()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    out, expected = compiled(data), loss(data)
    # Sampled entropies differ by their noise; what is left is the likelihood.
    likelihood = [
        x["loss_backtrack"] + 0.5 * x.get("backtrack_action_entropy", torch.zeros(()))
        for x in (out, expected)
    ]
    torch.testing.assert_close(*likelihood)


def test_an_action_outside_a_uniform_box_is_refused_and_impossible():
    model = BacktrackModel(2, 2, num_cells=(8,), reverse_action="uniform")
    data = TensorDict(
        {
            "observation": torch.zeros(3, 2),
            "action": torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 3.0]]),
            "next": {"observation": torch.zeros(3, 2)},
        },
        [3],
    )
    assert torch.isneginf(model.log_prob(data)).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="1 of 3 transitions have an action outside"):
        BacktrackLoss(model)(data)

"""Several choices at once: multi-categorical, multi-one-hot, binary actions, several agents'."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import distributions as D
from torch import nn
from torchrl.data import Binary, Categorical, MultiCategorical, MultiOneHot, OneHot
from trace_data import assert_same

from torchrl_recall import BacktrackLoss, BacktrackModel, sample_traces
from torchrl_recall.model.action import ActionCodec
from torchrl_recall.model.factors import FactoredHead
from torchrl_recall.traces import draw_noise
from torchrl_recall.traces.eager import unsupported

F64, CPU = torch.float64, torch.device("cpu")
# Name: spec, number of classes of each factor.
SPECS = {
    "multi_categorical": (MultiCategorical([2, 3, 4]), [2, 3, 4]),
    "multi_categorical_int32": (MultiCategorical([2, 3], dtype=torch.int32), [2, 3]),
    "multi_categorical_of_agents": (MultiCategorical([2, 3], shape=(2, 2)), [2, 3, 2, 3]),
    "multi_categorical_uneven": (MultiCategorical(torch.tensor([[2, 3], [4, 5]])), [2, 3, 4, 5]),
    "multi_one_hot": (MultiOneHot([2, 3, 4]), [2, 3, 4]),
    "multi_one_hot_float": (MultiOneHot([3, 2], dtype=torch.float32), [3, 2]),
    "multi_one_hot_of_agents": (MultiOneHot([2, 3], shape=(2, 5)), [2, 3, 2, 3]),
    "binary": (Binary(3), [2, 2, 2]),
    "binary_bool": (Binary(3, dtype=torch.bool), [2, 2, 2]),
    "binary_matrix": (Binary(shape=(2, 2)), [2] * 4),
    "categorical_of_agents": (Categorical(4, shape=(3,)), [4] * 3),
    "one_hot_of_agents": (OneHot(4, shape=(3, 4)), [4] * 3),
}


def make_model(spec, dtype=F64, **kwargs):
    torch.manual_seed(0)
    options = {"num_cells": (16,), "dtype": dtype, **kwargs}
    return BacktrackModel(3, spec, **options)


class TestHead:
    CARDINALITY = (2, 4, 3)

    def parameters(self, *batch):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*batch, sum(self.CARDINALITY), generator=generator, dtype=F64)

    def factors(self, parameters):
        split = parameters.split(list(self.CARDINALITY), -1)
        return [D.Categorical(logits=logits) for logits in split]

    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
    def test_against_torch_distributions(self, batch):
        head, parameters = FactoredHead(self.CARDINALITY), self.parameters(*batch)
        factors = self.factors(parameters)
        value = torch.stack([factor.sample() for factor in factors], -1)
        expected = sum(
            factor.log_prob(v) for factor, v in zip(factors, value.unbind(-1), strict=True)
        )
        torch.testing.assert_close(head.log_prob(parameters, value), expected)
        entropy = sum(factor.entropy() for factor in factors)
        torch.testing.assert_close(head.entropy(parameters), entropy)

    def test_gradients(self):
        head, parameters = FactoredHead(self.CARDINALITY), self.parameters(5).requires_grad_()
        value = torch.tensor([1, 3, 2]).expand(5, 3)
        for mine, theirs in (
            (head.log_prob(parameters, value), lambda f, v: f.log_prob(v)),
            (head.entropy(parameters), lambda f, v: f.entropy()),
        ):
            (gradient,) = torch.autograd.grad(mine.sum(), parameters)
            pairs = zip(self.factors(parameters), value.unbind(-1), strict=True)
            total = sum(theirs(factor, v).sum() for factor, v in pairs)
            torch.testing.assert_close(gradient, torch.autograd.grad(total, parameters)[0])

    def test_samples_invert_each_factors_cumulative_distribution(self):
        head, parameters = FactoredHead(self.CARDINALITY), self.parameters(50)
        noise = torch.rand(50, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
        value, log_prob = head.sample(parameters, noise)
        for row in range(50):
            for i, factor in enumerate(self.factors(parameters[row])):
                cumulative, index = 0.0, -1
                while cumulative <= noise[row, i]:
                    index += 1
                    cumulative += float(factor.probs[index])
                assert value[row, i] == index
        assert torch.equal(log_prob, head.log_prob(parameters, value))

    def test_features_are_one_hot(self):
        head = FactoredHead(self.CARDINALITY)
        assert head.features(torch.tensor([1, 0, 2])).tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", SPECS)
def test_restores_what_it_read(kind, batch):
    torch.manual_seed(0)
    spec, cardinality = SPECS[kind]
    codec = ActionCodec(spec, (-5.0, 2.0), dtype=F64)
    assert codec.head.cardinality == cardinality
    value = spec.expand(*batch, *spec.shape).rand() if batch else spec.rand()
    flat = codec.read(TensorDict({"action": value}, batch), "action", CPU)
    assert flat.shape == (*batch, len(cardinality))
    assert bool(((flat >= 0) & (flat < torch.tensor(cardinality))).all())
    restored = codec.restore(flat)
    assert restored.dtype == value.dtype
    assert torch.equal(restored, value)


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (MultiCategorical([2, 3]), [[0, 3]], r"'action' must lie in 0 to \[1, 2\], got 0 to 3"),
        (MultiCategorical([2, 3]), [[-1, 0]], r"'action' must lie in 0 to \[1, 2\], got -1 to 0"),
        (MultiCategorical([2, 3]), [[0.0, 0.0]], "'action' must hold integers"),
        (MultiCategorical([2, 3]), [[True, True]], "'action' must hold integers"),
        (MultiCategorical([2, 3]), [[0]], r"'action' has shape \(1, 1\), expected \(1, 2\)"),
        (MultiOneHot([2, 2]), [[1, 1, 0, 0]], r"'action' must be one-hot over \[2, 2\]"),
        (MultiOneHot([2, 2]), [[1, 0, 0, 0]], r"'action' must be one-hot over \[2, 2\]"),
        (Binary(2), [[0, 2]], r"'action' must lie in 0 to \[1, 1\]"),
        (OneHot(2, shape=(2, 2)), [[[1, 0], [1, 1]]], r"'action' must be one-hot over \[2\]"),
    ],
)
def test_refuses_values_by_name(spec, value, message):
    codec = ActionCodec(spec, (-5.0, 2.0), dtype=F64)
    with pytest.raises(ValueError, match=message):
        codec.read(TensorDict({"action": torch.tensor(value)}, [1]), "action", CPU)


OPTIONS = {
    "plain": {},
    "stop": {"stop": True},
    "uniform": {"reverse_action": "uniform"},
    "ensemble": {"num_members": 3},
}


class TestWalk:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("kind", SPECS)
    def test_backends_agree(self, kind, options):
        spec, cardinality = SPECS[kind]
        model = make_model(spec, **OPTIONS[options])
        start = torch.randn(20, 3, dtype=F64)
        noise = draw_noise(model, 6, 20, torch.Generator().manual_seed(1))
        assert noise.action.shape == (6, 20, len(cardinality))
        reference, eager = (
            sample_traces(model, start, num_steps=6, noise=noise, backend=backend)
            for backend in ("reference", "eager")
        )
        assert_same(reference, eager, tolerance=1e-11)
        assert reference["action"].shape == (20, 6, *spec.shape)
        assert reference["action"].dtype == spec.dtype
        assert spec.expand(20, 6, *spec.shape).is_in(reference["action"])

    def test_log_prob_is_the_models_own(self):
        model = make_model(SPECS["multi_one_hot"][0])
        trace = sample_traces(model, torch.randn(20, 3, dtype=F64), num_steps=5)
        torch.testing.assert_close(
            model.log_prob(trace), trace["action_log_prob"] + trace["delta_log_prob"]
        )

    @pytest.mark.parametrize("backend", ["native", "table", "triton"])
    def test_other_backends_refuse(self, backend):
        model = make_model(Binary(3), dtype=torch.float32)
        assert unsupported(model) is None
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run this model"):
            sample_traces(model, torch.zeros(2, 3), num_steps=2, backend=backend)

    def test_auto_falls_back_with_one_warning(self, recwarn):
        model = make_model(Binary(3), dtype=torch.float32)
        for _ in range(3):
            sample_traces(model, torch.zeros(2, 3), num_steps=2)
        (warning,) = recwarn.list
        assert "falls back to the eager backend" in str(warning.message)

    def test_uniform_actions_are_uniform(self):
        """Each of 24 joint actions within 5 standard errors: wrong in 1e-5 of seeds."""
        model = make_model(MultiCategorical([2, 3, 4]), reverse_action="uniform")
        trace = sample_traces(
            model,
            torch.zeros(6000, 3, dtype=F64),
            num_steps=2,
            generator=torch.Generator().manual_seed(0),
        )
        joint = (trace["action"] * torch.tensor([12, 4, 1])).sum(-1).flatten()
        share = torch.bincount(joint, minlength=24) / joint.numel()
        error = (1 / 24 * 23 / 24 / joint.numel()) ** 0.5
        assert bool(((share - 1 / 24).abs() < 5 * error).all())
        assert torch.allclose(trace["action_log_prob"].exp(), torch.tensor(1 / 24, dtype=F64))


def test_learns_factors_of_the_state():
    """The first factor is the state's sign, the others are even: entropy log 3 + log 2 remains."""
    torch.manual_seed(0)
    model = make_model(MultiCategorical([2, 3, 2]), dtype=torch.float32)
    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        following = torch.randn(256, 3)
        action = torch.stack([torch.randint(n, (256,)) for n in (2, 3, 2)], -1)
        action[:, 0] = (following[:, 0] > 0).long()
        data = TensorDict({"observation": following + 1, "action": action}, [256])
        data["next", "observation"] = following
        out = loss(data)
        optimizer.zero_grad()
        out["loss_backtrack"].backward()
        optimizer.step()
    entropy = torch.log(torch.tensor(6.0))
    assert abs(float(-out["backtrack_action_log_prob"]) - entropy) < 0.1
    trace = sample_traces(model, following, num_steps=1, backend="eager")
    right = trace["action"][:, 0, 0] == (following[:, 0] > 0)
    assert float(right.float().mean()) > 0.95


def test_padding_is_passed_over():
    for spec, _ in SPECS.values():
        model = make_model(spec)
        data = TensorDict(
            {
                "observation": torch.randn(4, 3, dtype=F64),
                "action": spec.expand(4, *spec.shape).rand(),
                "next": {"observation": torch.randn(4, 3, dtype=F64)},
            },
            [4],
        )
        expected = BacktrackLoss(model).eval()(data[:3])["loss_backtrack"]
        data["action"][3] = 0  # no one-hot row
        data["observation"][3] = torch.nan
        data["collector", "mask"] = torch.tensor([True, True, True, False])
        found = BacktrackLoss(model).eval()(data)["loss_backtrack"]
        torch.testing.assert_close(found, expected)


def test_state_and_device_travel():
    model = make_model(MultiCategorical([2, 3])).to(torch.float32)
    assert isinstance(model.action.head, nn.Module)
    assert [name for name in model.state_dict() if "place" in name or "offsets" in name] == []
    meta = BacktrackModel(3, MultiCategorical([2, 3]), num_cells=(8,), device="meta")
    assert meta.action.head.place.is_meta

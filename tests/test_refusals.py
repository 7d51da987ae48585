"""Refusals that generated calls had asked for, one by one, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from loss_data import make_actor, make_model, recall, transitions
from tensordict import TensorDict
from torchrl.data import MultiCategorical, OneHot

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    sample_traces,
)
from torchrl_recall.checks import check_key, check_keys, check_real, usable_device


def statistics(model):
    return [x.clone() for name, x in model.named_buffers() if "normalizer" in name]


def same(before, after):
    return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("huge", [1e30, -1e30, 3e38])
@pytest.mark.parametrize("key", ["observation", ("next", "observation"), "action"])
def test_numbers_whose_squares_overflow_do_not_reach_the_statistics(huge, key):
    model = make_model(action=MODEL_ACTION)
    loss, data = BacktrackLoss(model), transitions(5, kind="normal")
    loss(data)
    before = statistics(model)
    data[key][2, 0] = huge
    with pytest.raises(ValueError, match=r"1 of 5 transitions have NaN, infinite or huge entries"):
        loss(data)
    assert same(before, statistics(model))
    masked = BacktrackLoss(model, mask_nonfinite=True)
    rest = data[[0, 1, 3, 4]]
    model.eval()
    masked.eval()
    found, expected = masked(data)["loss_backtrack"], masked(rest)["loss_backtrack"]
    torch.testing.assert_close(found, expected)


def _model_action():
    from torchrl.data import Unbounded

    return Unbounded((2,))


MODEL_ACTION = _model_action()


def test_large_numbers_that_can_be_squared_are_fitted():
    model = make_model(action=MODEL_ACTION)
    data = transitions(5, kind="normal")
    data["observation"][2, 0] = 1e15
    assert bool(BacktrackLoss(model)(data)["loss_backtrack"].isfinite())
    assert all(bool(x.isfinite().all()) for x in statistics(model))


def test_a_refused_displacement_leaves_the_statistics():
    support = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    model = BacktrackModel(3, 2, num_cells=(8,), delta_support=support)
    state = torch.zeros(4, 3)
    data = {"observation": state, "action": torch.zeros(4, 2), "next": {"observation": state}}
    data = TensorDict(data, [4])
    loss = BacktrackLoss(model)
    loss(data)
    before = statistics(model)
    moved = data.clone()
    moved["observation"][1, 0] = 0.5
    with pytest.raises(ValueError, match="1 of 4 transitions have a displacement"):
        loss(moved)
    assert same(before, statistics(model))


def test_one_hot_actions_of_bools_are_imitated():
    """The dtype of TorchRL's one-hot specs."""
    model = make_model(action=OneHot(4))
    trace = sample_traces(model, torch.zeros(3, 3), num_steps=4)
    assert trace["action"].dtype == torch.bool
    actor = make_actor("one_hot")
    found = RecallTraceLoss(actor)(TensorDict({"trace": trace}, [3]))["loss_imitation"]
    log_prob = actor.get_dist(trace).logits.log_softmax(-1)
    expected = -log_prob[trace["action"]].mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [-1, 4, 2**62])
def test_classes_that_do_not_exist(wrong):
    data = recall(3, 4, kind="categorical", mask=False)
    data["trace", "action"][1, 2] = wrong
    loss = RecallTraceLoss(make_actor("categorical"))
    with pytest.raises(ValueError, match=r"'action' must hold classes from 0 to 3"):
        loss(data)
    data["trace", "collector", "mask"][1, 2] = False
    assert bool(loss(data)["loss_imitation"].isfinite())


def test_actions_too_large_for_the_policy():
    data = recall(3, 4, kind="normal", mask=False)
    data["trace", "action"][0, 0] = 3e38
    loss = RecallTraceLoss(make_actor("normal"))
    with pytest.raises(ValueError, match="the actor's log_prob at kept steps must be finite"):
        loss(data)
    data["trace", "collector", "mask"][0, 0] = False
    assert bool(loss(data)["loss_imitation"].isfinite())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_masks_of_integers_are_masks(dtype):
    data = recall(3, 4)
    loss = RecallTraceLoss(make_actor())
    expected = loss(data)["loss_imitation"]
    data["trace", "collector", "mask"] = data["trace", "collector", "mask"].to(dtype)
    torch.testing.assert_close(loss(data)["loss_imitation"], expected)


def test_masks_of_floats_are_refused():
    data = recall(3, 4)
    data["trace", "collector", "mask"] = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"mask \('collector', 'mask'\) must be bool"):
        RecallTraceLoss(make_actor())(data)


FLAGS = [
    (lambda x: BacktrackLoss(make_model(), mask_nonfinite=x), "mask_nonfinite"),
    (lambda x: BacktrackTransform(make_model(), num_steps=2, last_visit=x), "last_visit"),
    (lambda x: sample_traces(make_model(), torch.zeros(1, 3), num_steps=1, last_visit=x), "last_v"),
    (lambda x: BacktrackModel(3, 2, stop=x), "stop"),
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
@pytest.mark.parametrize("wrong", ["no", None, torch.zeros(2), 1.0])
def test_flags_are_true_or_false(make, name, wrong):
    with pytest.raises(TypeError, match=f"{name}.* must be True or False"):
        make(wrong)


@pytest.mark.parametrize("wrong", [None, 3, (), ("a", 3), b"x", ["a", ["b"]], torch.float32])
def test_keys(wrong):
    with pytest.raises(TypeError, match=r"value_key must be a key"):
        check_key("value_key", wrong)
    with pytest.raises(TypeError, match=r"in_keys must be a"):
        check_keys("in_keys", [wrong] if wrong is not None else wrong)
    assert check_key("k", ("a", ("b", "c"))) == ("a", "b", "c")
    assert check_keys("k", "a") == ["a"]
    assert check_keys("k", ["a", ("b", "c")]) == ["a", ("b", "c")]


@pytest.mark.parametrize("wrong", ["x", "", "cpu:x", -1, 2**70, [], "cuda:99"])
def test_devices(wrong):
    with pytest.raises(ValueError, match=r"device .* cannot be used"):
        usable_device("device", wrong)
    with pytest.raises(ValueError, match=r"device .* cannot be used"):
        BacktrackModel(3, 2, device=wrong)
    with pytest.raises(ValueError, match=r"device .* cannot be used"):
        ValuePrioritizedSampler(3, device=wrong)


def test_integers_beyond_all_floats():
    assert check_real("x", 10**400) == math.inf
    assert check_real("x", -(10**400)) == -math.inf
    for wrong in (10**400, math.inf, 1e31):
        with pytest.raises(ValueError, match="imitation_coeff must lie in"):
            RecallTraceLoss(make_actor(), imitation_coeff=wrong)
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        ValuePrioritizedSampler(3, temperature=10**400)
    with pytest.raises(ValueError, match=r"num_steps must be below 2\*\*63"):
        sample_traces(make_model(), torch.zeros(1, 3), num_steps=2**63)


def test_observations_that_are_no_tensors():
    model = BacktrackModel(MultiCategorical([3, 3]), 2, num_cells=(4,))
    data = TensorDict({"observation": "north", "action": torch.zeros(2, 2)}, [2])
    data["next", "observation"] = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="'observation' must be a tensor, got"):
        model.log_prob(data)

"""A tuple of strings is one nested key, a list is several: wherever keys are arguments."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage
from torchrl.envs import PendulumEnv

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    CellSupport,
    DataSupport,
    GoalGAN,
)
from torchrl_recall.checks import as_keys, check_keys
from torchrl_recall.diagnostics import tensordict_step
from torchrl_recall.model.environment_specs import model_arguments
from torchrl_recall.starts import BestStarts, FrontierStarts, GoalStarts, NextStates
from torchrl_recall.temporal_distance import TemporalDistance, TemporalDistanceLoss
from torchrl_recall.trace_masks import (
    ForwardAgreement,
    LastVisitCells,
    LastVisitRadius,
    RisingDistance,
    RisingValue,
)


def small_model(observation, keys):
    return BacktrackModel(observation, 2, num_cells=(4,), observation_keys=keys)


def model_keys(keys):
    return small_model({key: 1 for key in as_keys(keys)}, keys).observation_keys


def distance_keys(keys):
    distance = TemporalDistance({key: 1 for key in as_keys(keys)}, observation_keys=keys)
    loss = TemporalDistanceLoss(distance)
    loss.set_keys(observation=keys)
    return loss.in_keys[: len(as_keys(keys))]


def loss_keys(keys):
    loss = BacktrackLoss(small_model({key: 1 for key in as_keys(keys)}, keys))
    loss.set_keys(observation=keys)
    return loss.in_keys[: len(as_keys(keys))]


def rising_value_keys(keys):
    network = TensorDictModule(lambda *x: x[0], as_keys(keys), ["state_value"])
    return RisingValue(network, in_keys=keys).in_keys


def forward_keys(keys):
    network = TensorDictModule(lambda *x: x, as_keys(keys), as_keys(keys))
    mask = ForwardAgreement(network, 1.0, in_keys=keys, prediction_keys=keys)
    assert mask.prediction_keys == mask.in_keys
    return mask.in_keys


def transform_keys(keys):
    model = small_model({str(i): 1 for i in range(len(as_keys(keys)))}, None)
    return BacktrackTransform(model, num_steps=2, in_keys=keys).in_keys


READERS = {
    "check_keys": lambda keys: check_keys("keys", keys),
    "as_keys": as_keys,
    "BacktrackModel": model_keys,
    "BacktrackLoss": loss_keys,
    "BacktrackTransform": transform_keys,
    "TemporalDistance": distance_keys,
    "NextStates": lambda keys: NextStates(keys).observation_keys,
    "BestStarts": lambda keys: BestStarts("value", observation_keys=keys).observation_keys,
    "GoalStarts": lambda keys: GoalStarts(keys, observation_keys=keys).observation_keys,
    "goals": lambda keys: GoalStarts(keys, observation_keys=keys).goal_keys,
    "FrontierStarts": lambda keys: (
        FrontierStarts(LazyTensorStorage(4), observation_keys=keys).observation_keys
    ),
    "GoalGAN": lambda keys: GoalGAN(2, observation_keys=keys).observation_keys,
    "DataSupport": lambda keys: DataSupport(keys).keys,
    "CellSupport": lambda keys: CellSupport(keys).keys,
    "LastVisitCells": lambda keys: LastVisitCells(1.0, in_keys=keys).in_keys,
    "LastVisitRadius": lambda keys: LastVisitRadius(1.0, in_keys=keys).in_keys,
    "RisingValue": rising_value_keys,
    "RisingDistance": lambda keys: (
        RisingDistance(lambda s, g: (g - s).norm(dim=-1), in_keys=keys).in_keys
    ),
    "ForwardAgreement": forward_keys,
}


@pytest.mark.parametrize("name", READERS)
def test_one_key_or_several(name):
    read = READERS[name]
    assert read("a") == ["a"]
    assert read(["a"]) == ["a"]
    assert read(("a", "b")) == [("a", "b")]
    assert read([("a", "b")]) == [("a", "b")]
    assert read(["a", ("b", "c")]) == ["a", ("b", "c")]


def test_out_keys_of_the_transform():
    model = BacktrackModel(3, 2, num_cells=(4,))
    data = TensorDict({"next": {"observation": torch.zeros(2, 3)}}, [2])
    for keys in (("deep", "trace"), [("deep", "trace")]):
        transform = BacktrackTransform(model, num_steps=2, out_keys=keys)
        assert transform(data.copy())["deep", "trace"].shape == (2, 2)
    with pytest.raises(ValueError, match="out_keys must name one key for the traces"):
        BacktrackTransform(model, num_steps=2, out_keys=["deep", "trace"])


def test_keys_of_an_environment():
    env = PendulumEnv()
    arguments = model_arguments(env, ["th", "thdot"], None, None, "is_init", None)
    assert list(arguments["observation"]) == ["th", "thdot"]
    with pytest.raises(KeyError, match=r"\('th', 'thdot'\)"):
        model_arguments(env, ("th", "thdot"), None, None, "is_init", None)
    with pytest.raises(KeyError, match=r"\('th', 'thdot'\)"):
        tensordict_step(env, ("th", "thdot"))


@pytest.mark.parametrize(("wrong", "error"), [(3, TypeError), ([3], TypeError), ([], ValueError)])
@pytest.mark.parametrize("name", ["check_keys", "NextStates", "DataSupport", "LastVisitCells"])
def test_no_keys(name, wrong, error):
    with pytest.raises(error, match=r"must (be|name) "):
        READERS[name](wrong)

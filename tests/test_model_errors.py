"""What the model refuses: arguments, environments and data, by name."""

from __future__ import annotations

import math

import pytest
import torch
from model_data import random_transitions
from torchrl.data import (
    Categorical as CategoricalSpec,
)
from torchrl.data import Composite, MultiCategorical, NonTensor

from torchrl_recall import BacktrackModel
from torchrl_recall.envs import FourRoomsEnv


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"observation": 0}, ValueError, r"observation\['observation'\] must be at least 1"),
        ({"observation": "x"}, TypeError, "observation 'observation' is a str"),
        ({"action": NonTensor()}, TypeError, "action is a NonTensor"),
        ({"action": {}}, ValueError, "action must name at least one key"),
        ({"num_cells": (0,)}, ValueError, "num_cells must be at least 1"),
        ({"num_cells": (1.5,)}, TypeError, "num_cells must be an int"),
        ({"observation_keys": ["a", "b"]}, ValueError, "observation_keys are"),
        ({"observation": {"a": 1}, "observation_keys": ["b"]}, KeyError, "observation_keys"),
        ({"action_log_scale_range": (2, 1)}, ValueError, "action_log_scale_range"),
        ({"delta_log_scale_range": 3}, ValueError, "delta_log_scale_range"),
        ({"delta_log_scale_range": (0, math.inf)}, ValueError, "delta_log_scale_range"),
        ({"observation": MultiCategorical([40, 40])}, ValueError, "pass delta_support"),
        ({"delta_support": torch.zeros(2, 2)}, ValueError, r"delta_support has shape \(2, 2\)"),
        ({"delta_support": torch.zeros(0, 3)}, ValueError, r"delta_support has shape \(0, 3\)"),
        ({"delta_support": torch.zeros(2, 3)}, ValueError, "delta_support has the same"),
        ({"delta_support": torch.full((1, 3), torch.nan)}, ValueError, "delta_support must be fin"),
        (
            {"observation": CategoricalSpec(3), "delta_support": torch.zeros(1, 1)},
            ValueError,
            "delta_support must hold integers",
        ),
    ],
)
def test_the_constructor_refuses_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        BacktrackModel(**{"observation": 3, "action": 1, **arguments})


class TwoKeys(FourRoomsEnv):
    """A maze that shows its cell twice, under names that none expects."""

    def _make_specs(self):
        super()._make_specs()
        cell = self.observation_spec["observation"]
        self.observation_spec = Composite(a=cell, b=cell.clone())


def test_from_env_refuses_by_name():
    with pytest.raises(TypeError, match="env must be a torchrl EnvBase, got str"):
        BacktrackModel.from_env("Pendulum-v1")
    with pytest.raises(ValueError, match=r"observation_keys must be named.*'a', 'b'"):
        BacktrackModel.from_env(TwoKeys(5))
    with pytest.raises(KeyError, match="observation_keys"):
        BacktrackModel.from_env(FourRoomsEnv(5), observation_keys=["cell"])
    assert BacktrackModel.from_env(TwoKeys(5), observation_keys=["b"]).observation_keys == ["b"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda data: data.exclude("action"), KeyError, "'action' is missing"),
        (lambda data: data.exclude("observation"), KeyError, "'observation' is missing"),
        (lambda data: data.exclude("next"), KeyError, "'next', 'observation'.* is missing"),
        (lambda data: data[:0], ValueError, r"data is empty: batch size \(0,\)"),
        (lambda data: data.to_dict(), TypeError, "data must be a TensorDict, got dict"),
        (lambda data: data.set("action", torch.zeros(4, 3)), ValueError, "'action' has shape"),
        (lambda data: data.set("observation", torch.zeros(4, 2)), ValueError, "'observation' has"),
        (
            lambda data: data.set(("next", "observation"), torch.full((4, 3), torch.nan)),
            ValueError,
            "'next', 'observation'.* must be finite",
        ),
    ],
)
def test_log_prob_refuses_by_name(change, error, message):
    with pytest.raises(error, match=message):
        BacktrackModel(3, 2, num_cells=(8,)).log_prob(change(random_transitions(4)))

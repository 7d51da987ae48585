"""Models, policies and data of every kind, drawn from a `random.Random`.

Hypothesis hands in one whose choices it can shrink, `fuzz.py` a seeded one.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tensordict import LazyStackedTensorDict, TensorDict, unravel_key
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, Unbounded
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_recall import BacktrackModel
from torchrl_recall.model.observation import ObservationCodec

BATCHES = ((), (1,), (5,), (2, 3), (2, 1, 2))
LATTICE = torch.tensor([[0.0, 0.0], [0.5, 0.0], [-0.5, 0.0], [0.0, 0.5], [0.0, -0.5]])
CELLS = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
OBSERVATIONS = {
    "size": lambda dtype: 3,
    "scalar": lambda dtype: Unbounded((), dtype=dtype),
    "image": lambda dtype: Bounded(-2, 2, (2, 2), dtype=dtype),
    "lattice": lambda dtype: Bounded(-2, 2, (2,), dtype=dtype),
    "cells": lambda dtype: MultiCategorical([4, 5]),
    "class": lambda dtype: Categorical(6),
    "one_hot": lambda dtype: OneHot(5),
    "several": lambda dtype: {
        "position": Unbounded((2,), dtype=dtype),
        ("arm", "angle"): Bounded(-1, 1, (1,), dtype=dtype),
    },
}
ACTIONS = {
    "size": lambda dtype: 2,
    "bounded": lambda dtype: Bounded(-2, 5, (2,), dtype=dtype),
    "unbounded": lambda dtype: Unbounded((1,), dtype=dtype),
    "categorical": lambda dtype: Categorical(3),
    "one_hot": lambda dtype: OneHot(3),
    "matrix": lambda dtype: Bounded(-1, 1, (2, 2), dtype=dtype),
}


def generator(rng):
    return torch.Generator().manual_seed(rng.randrange(2**31))


def make_setup(rng, *, flat_action=False, stop=None):
    """A backtracking model, and what is needed to make data for it.

    Args:
        rng (random.Random): all choices.
        flat_action (bool): only actions that TorchRL's policies know.
        stop (bool, optional): whether it has a stop head.
    """
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    kind = rng.choice(sorted(OBSERVATIONS))
    action_kind = rng.choice(
        [name for name in sorted(ACTIONS) if name != "matrix" or not flat_action]
    )
    spec, support, names = OBSERVATIONS[kind](dtype), None, None
    if kind in ("lattice", "cells"):
        support = LATTICE.to(dtype) if kind == "lattice" else CELLS
    if kind != "several":
        names = [rng.choice(["observation", "pixels", ("agent", "state")])]
    torch.manual_seed(rng.randrange(2**31))
    options = {}
    if rng.random() < 0.3:
        options |= {"num_members": 2, "member_per": rng.choice(["step", "trace"])}
    if support is None and kind in ("size", "scalar", "image", "several") and rng.random() < 0.3:
        options["num_components"] = 2
    if action_kind != "unbounded" and rng.random() < 0.3:
        options["reverse_action"] = "uniform"
    model = BacktrackModel(
        spec,
        ACTIONS[action_kind](dtype),
        num_cells=rng.choice([[4], [4, 4], []]),
        activation_class=rng.choice([nn.ReLU, nn.Tanh]),
        delta_support=support,
        stop=rng.choice([False, True]) if stop is None else stop,
        observation_keys=names,
        action_key=rng.choice(["action", ("agent", "move")]),
        dtype=dtype,
        **options,
    )
    return SimpleNamespace(model=model, kind=kind, action_kind=action_kind, dtype=dtype)


def states(setup, batch, rng):
    """Flat states ``[*batch, size]`` that exist."""
    codec, random = setup.model.observation, generator(rng)
    if codec.is_discrete:
        index = torch.randint(codec.num_states, batch, generator=random)
        return codec.from_joint_index(index)
    if setup.kind == "lattice":
        size = (*batch, codec.size)
        return torch.randint(-3, 4, size, generator=random).to(setup.dtype) / 2
    return torch.randn(*batch, codec.size, generator=random, dtype=setup.dtype)


def actions(setup, batch, rng):
    """Actions ``[*batch, *shape]`` that the spec allows."""
    action, random = setup.model.action, generator(rng)
    if action.format == "continuous":
        size = torch.Size((*batch, action.head.size))
        return action.restore(1.8 * torch.rand(size, generator=random, dtype=setup.dtype) - 0.9)
    return action.restore(torch.randint(action.head.output_size, batch, generator=random))


def transitions(setup, batch, rng):
    """Transitions with all that the losses, the transform and the values read."""
    model, random = setup.model, generator(rng)
    codec = model.observation
    following = states(setup, batch, rng)
    state = states(setup, batch, rng)
    if model.delta_head.noise_kind == "uniform" and setup.kind in ("lattice", "cells"):
        support = LATTICE.to(setup.dtype) if setup.kind == "lattice" else CELLS
        state = following + support[torch.randint(len(support), batch, generator=random)]
        if codec.is_discrete:
            # Where a step would leave the maze, stay.
            inside = codec.are_states(state).unsqueeze(-1)
            state = torch.where(inside, state, following)
    data = TensorDict({}, batch)
    for key, value in codec.restore(state).items():
        data[key] = value
    for key, value in codec.restore(following).items():
        data[unravel_key(("next", key))] = value
    data[model.action_key] = actions(setup, batch, rng)
    data["is_init"] = torch.rand(*batch, 1, generator=random) < 0.3
    data["value_target"] = torch.randn(*batch, 1, generator=random)
    data["next", "reward"] = torch.randn(*batch, 1, generator=random, dtype=setup.dtype)
    for name in ("terminated", "done"):
        data["next", name] = torch.rand(*batch, 1, generator=random) < 0.3
    if rng.choice([False, False, True]):
        data["collector", "mask"] = torch.rand(batch, generator=random) < 0.7
    if batch and batch[0] > 1 and rng.choice([False, False, True]):
        data = LazyStackedTensorDict.lazy_stack(list(data.unbind(0)), 0)
    return data


class _Network(nn.Module):
    """One layer behind the features of a model's observations, which may be several keys."""

    def __init__(self, setup, width, *rest):
        super().__init__()
        spec, keys = OBSERVATIONS[setup.kind](setup.dtype), setup.model.observation_keys
        specs = list(spec.values()) if isinstance(spec, dict) else [spec]
        self.codec = ObservationCodec(dict(zip(keys, specs, strict=True)), dtype=setup.dtype)
        self.linear = nn.Linear(self.codec.feature_size, width, dtype=setup.dtype)
        self.rest = nn.Sequential(*rest)

    def forward(self, *observation):
        given = dict(zip(self.codec.keys, observation, strict=True))
        state = self.codec.flatten(given, "observation", check_values=False)
        return self.rest(self.linear(self.codec(state)))


def make_actor(setup):
    """A policy for the model's observations and (flat) actions."""
    model, kwargs = setup.model, {}
    head, keys = model.action.head, model.observation_keys
    if model.action.format == "continuous":
        names = ["loc", "scale"]
        network = _Network(setup, 2 * head.size, NormalParamExtractor())
        law = IndependentNormal if setup.action_kind == "unbounded" else TanhNormal
        if setup.action_kind == "bounded":
            kwargs = {"low": -2.0, "high": 5.0}
    else:
        names, network = ["logits"], _Network(setup, head.output_size)
        law = OneHotCategorical if model.action.format == "one_hot" else D.Categorical
    return ProbabilisticActor(
        TensorDictModule(network, keys, names),
        names,
        out_keys=[model.action_key],
        distribution_class=law,
        distribution_kwargs=kwargs,
    )


def make_critic(setup):
    """A value network on the same observations."""
    return TensorDictModule(_Network(setup, 1), setup.model.observation_keys, ["state_value"])

"""Calls of the losses, the model, the walk and the transform: valid arguments, and what must hold.

Each target draws a `Case` from a `random.Random`; `fuzz.py` spoils its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from generated import (
    ACTIONS,
    BATCHES,
    OBSERVATIONS,
    generator,
    make_actor,
    make_setup,
    states,
    transitions,
)
from mutations import digest
from tensordict import TensorDict
from torch import nn

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    sample_traces,
)
from torchrl_recall.envs import FourRoomsEnv

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Case:
    """One call.

    Attributes:
        arguments: by name; these are spoilt.
        run: makes the call.
        check: raises AssertionError unless the result keeps the contract.
        guarded: what a refusal must not change, beside the arguments.
        words: what messages may name, beside the arguments.
        refusals: how messages of further documented exceptions begin.
    """

    arguments: dict[str, Any]
    run: Callable[[dict[str, Any]], Any]
    check: Callable[[dict[str, Any], Any], None]
    guarded: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    refusals: tuple[str, ...] = field(default=())


def finite(data):
    """Whether all numbers are finite."""
    if isinstance(data, torch.Tensor):
        return data.device.type == "meta" or bool(torch.isfinite(data).all())
    return all(finite(value) for value in data.values(True, True))


def keys_of(data):
    return (*(repr(key) for key in data.keys(True)), "('collector', 'mask')", "the data")


def key_parts(key):
    """A key, and what it is made of."""
    return (repr(key), *(key if isinstance(key, tuple) else (key,)))


def pick(rng, options):
    """A few of the optional arguments."""
    return {name: value for name, value in options.items() if rng.random() < 0.5}


def model_init(rng):
    dtype = rng.choice([torch.float32, torch.float64])
    names = sorted(set(OBSERVATIONS) - {"several", "lattice", "cells"})
    arguments = {
        "observation": OBSERVATIONS[rng.choice(names)](dtype),
        "action": ACTIONS[rng.choice(sorted(ACTIONS))](dtype),
        "dtype": dtype,
    }
    arguments |= pick(
        rng,
        {
            "num_cells": rng.choice([(8,), [3, 2], ()]),
            "activation_class": nn.Tanh,
            "delta_support": None,
            "stop": True,
            "observation_keys": ["pixels"],
            "action_key": ("a", "b"),
            "is_init_key": "begins",
            "action_log_scale_range": (-4.0, 1.0),
            "delta_log_scale_range": (-4.0, 1.0),
            "num_components": 1,
            "num_members": rng.choice([1, 2]),
            "member_per": "trace",
            "reverse_action": "learned",
            "device": "cpu",
        },
    )

    def check(_, model):
        assert isinstance(model, BacktrackModel)
        assert all(finite(x) for x in model.parameters())

    return Case(arguments, lambda a: BacktrackModel(**a), check, words=("action", "observation"))


def model_from_env(rng):
    arguments = {"env": FourRoomsEnv(5, seed=0), "num_cells": (4,)}
    options = {"observation_keys": ["observation"], "stop": False, "is_init_key": "is_init"}
    arguments |= pick(rng, {**options, "delta_support": None, "device": "cpu"})

    def check(_, model):
        assert isinstance(model, BacktrackModel)

    return Case(arguments, lambda a: BacktrackModel.from_env(**a), check, words=("observation",))


def model_log_prob(rng):
    setup = make_setup(rng)
    data = transitions(setup, rng.choice(BATCHES), rng)

    def check(a, out):
        assert out.shape == a["data"].shape
        assert out.dtype == setup.dtype
        assert not bool(torch.isnan(out).any())

    case = Case({"data": data}, lambda a: setup.model.log_prob(a["data"]), check)
    case.guarded, case.words = (setup.model,), keys_of(data)
    return case


def backtrack_loss(rng):
    setup = make_setup(rng)
    data = transitions(setup, rng.choice(BATCHES[1:]), rng)
    arguments = {"model": setup.model, "data": data}
    options = {"reduction": rng.choice(REDUCTIONS), "mask_nonfinite": True}
    options |= {"generator": generator(rng)}
    if not setup.model.action.is_uniform:
        options["action_entropy_coeff"] = 0.1
    if setup.model.num_members > 1:
        options["bootstrap"] = True
    arguments |= pick(rng, options)

    def run(a):
        loss = BacktrackLoss(**{name: x for name, x in a.items() if name != "data"})
        out = loss(a["data"])
        out["loss_backtrack"].sum().backward()
        return out

    def check(a, out):
        shape = a["data"].shape if a.get("reduction") == "none" else ()
        assert out["loss_backtrack"].shape == shape or not a["data"].ndim
        assert finite(out)
        assert all(finite(p.grad) for p in setup.model.parameters() if p.grad is not None)
        statistics = [x for name, x in setup.model.named_buffers() if "normalizer" in name]
        assert all(map(finite, statistics))

    return Case(arguments, run, check, (setup.model,), (*keys_of(data), "delta_support"))


def recall_loss(rng):
    setup = make_setup(rng, flat_action=True)
    actor = make_actor(setup)
    batch = rng.choice([(4,), (2, 3), (1, 1), (2, 3, 2)])
    trace = transitions(setup, batch, rng)
    data = TensorDict({"trace": trace}, batch[:-1])
    with_model = rng.random() < 0.3
    if with_model:
        data.update(transitions(setup, batch[:-1], rng))
    arguments = {"actor": actor, "data": data}
    arguments |= {"model": setup.model} if with_model else {}
    options = {"imitation_coeff": 0.5, "backtrack_coeff": 2, "reduction": rng.choice(REDUCTIONS)}
    options |= {"discount": rng.choice([0, 0.9]), "normalize_weights": True, "weight": None}
    arguments |= pick(rng, options)

    def run(a):
        loss = RecallTraceLoss(**{name: x for name, x in a.items() if name != "data"})
        loss.set_keys(action=setup.model.action_key)
        out = loss(a["data"])
        sum(x.sum() for name, x in out.items() if name.startswith("loss_")).backward()
        return out

    def check(a, out):
        trace, shape = a["data"]["trace"], ()
        if a.get("reduction") == "none":
            # Without a batch size, as keyword tensors come, the policy says how many steps.
            action = trace[setup.model.action_key]
            shape = trace.shape or actor.get_dist(trace).log_prob(action).shape
        assert out["loss_imitation"].shape == shape
        assert 0 <= float(out["trace_kept"]) <= 1
        assert finite(out)
        assert all(finite(p.grad) for p in actor.parameters() if p.grad is not None)

    words = (*keys_of(data), *keys_of(trace), "trace")
    return Case(arguments, run, check, (actor, setup.model), words)


def _check_trace(setup, trace, batch, num_traces, num_steps):
    added = (num_steps,) if num_traces is None else (num_traces, num_steps)
    assert trace.shape == (*batch, *added)
    mask = trace["collector", "mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == trace.shape
    assert finite(trace)
    model = setup.model
    for keys in (model.observation_keys, model.next_observation_keys):
        state = model.observation.read(trace, keys, require_range=False)
        assert bool(model.observation.are_states(state)[mask].all())
    model.action.read(trace, model.action_key, model.device)
    for key, following in zip(model.observation_keys, model.next_observation_keys, strict=True):
        assert trace[key].dtype == trace[following].dtype
        time = trace.ndim - 1
        earlier, later = trace[following].unbind(time)[:-1], trace[key].unbind(time)[1:]
        assert all(torch.equal(x, y) for x, y in zip(earlier, later, strict=True))


def walk(rng):
    setup = make_setup(rng)
    batch = rng.choice([*BATCHES, (2000,)])
    start = setup.model.observation.restore(states(setup, batch, rng))
    start = rng.choice([start, TensorDict(start, batch)])
    if len(setup.model.observation_keys) == 1 and rng.random() < 0.5:
        start = start[setup.model.observation_keys[0]]
    arguments = {"model": setup.model, "next_observation": start}
    arguments["num_steps"] = 3 if batch == (2000,) else rng.choice([1, 2, 5, 200])
    options = {"num_traces": rng.choice([1, 3]), "last_visit": True, "generator": generator(rng)}
    options |= {"noise": None, "backend": rng.choice(["auto", "eager"]), "precision": "bfloat16"}
    options |= {"support": lambda state: state[..., 0] > -1, "num_candidates": rng.choice([1, 4])}
    arguments |= pick(rng, options)

    def check(a, trace):
        _check_trace(setup, trace, batch_of(trace, a), a.get("num_traces"), a["num_steps"])

    def batch_of(trace, a):
        return trace.shape[: trace.ndim - 1 - (a.get("num_traces") is not None)]

    words = tuple(part for key in setup.model.observation_keys for part in key_parts(key))
    return Case(arguments, lambda a: sample_traces(**a), check, (setup.model,), words)


def transform(rng):
    setup = make_setup(rng)
    data = transitions(setup, rng.choice(BATCHES), rng)
    arguments = {"model": setup.model, "data": data, "num_steps": rng.choice([1, 2, 20])}
    options = {
        "num_traces": rng.choice([1, 3]),
        "in_keys": setup.model.next_observation_keys,
        "out_keys": [rng.choice(["trace", ("recall", "trace")])],
        "last_visit": False,
        "min_value": 0.0,
        "value_key": "value_target",
        "generator": generator(rng),
        "backend": "eager",
        "precision": "tf32",
        "masks": (lambda trace: trace["collector", "mask"],),
        "start": None,
        "support": lambda state: state[..., 0] > -1,
        "num_candidates": rng.choice([1, 4]),
    }
    arguments |= pick(rng, options)

    def run(a):
        made = BacktrackTransform(**{name: x for name, x in a.items() if name != "data"})
        before = digest(a["data"])
        out = made(a["data"])
        key = made.out_keys[0]
        assert digest(out.exclude(key if isinstance(key, str) else key[0])) == before, (
            "data changed"
        )
        return out.get(key)

    def check(a, trace):
        _check_trace(setup, trace, a["data"].shape, a.get("num_traces"), a["num_steps"])

    return Case(arguments, run, check, (setup.model,), keys_of(data))


TARGETS = {
    "BacktrackModel": model_init,
    "BacktrackModel.from_env": model_from_env,
    "BacktrackModel.log_prob": model_log_prob,
    "BacktrackLoss": backtrack_loss,
    "RecallTraceLoss": recall_loss,
    "sample_traces": walk,
    "BacktrackTransform": transform,
}

"""Calls of what stands beside the data's way: sampler, values, checkpoint, trainer's hook.

As in `fuzz_targets.py`.
"""

from __future__ import annotations

import math
import os
import tempfile
from types import SimpleNamespace

import torch
from fuzz_targets import Case, keys_of, pick
from generated import generator, make_actor, make_critic, make_setup, transitions
from tensordict import LazyStackedTensorDict, TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall import (
    BacktrackLoss,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    ValueRefresh,
    transition_value,
)
from torchrl_recall.checkpoint import RecallCheckpoint
from torchrl_recall.priorities.trajectories import REDUCTIONS
from torchrl_recall.priorities.weights import MODES, value_weights
from torchrl_recall.trainer import RecallTraceHook

# What TorchRL's buffers expect of a sampler, in messages of our own.
REFUSALS = ("index must", "Cannot sample from an empty", "All ")


def parameters(rng):
    options = {
        "alpha": rng.choice([0.0, 0.6, 3]),
        "beta": rng.choice([0, 0.5]),
        "mode": rng.choice(MODES),
        "top": rng.choice([0.1, 1.0]),
        "temperature": rng.choice([0.01, 1.0, 100]),
        "min_value": rng.choice([None, 0.0]),
        "eps": 1e-3,
        "uniform_share": rng.choice([0, 0.5, 1]),
    }
    return pick(rng, options)


def sampler_init(rng):
    arguments = {"max_capacity": rng.choice([1, 10, 5000]), **parameters(rng)}
    options = {"dtype": torch.float64, "reduction": rng.choice(REDUCTIONS), "device": "cpu"}
    arguments |= pick(rng, {**options, "trajectory_key": "ids"})

    def run(a):
        sampler = ValuePrioritizedSampler(**a)
        repr(sampler)
        return sampler.weights(1)

    def check(_, weights):
        assert weights.shape == (1,)
        assert weights[0] > 0

    return Case(arguments, run, check, words=("index", "trajectory"))


def _filled(rng):
    """A buffer whose sampler has values, some of them infinite."""
    n = rng.choice([1, 7, 40])
    sampler = ValuePrioritizedSampler(rng.choice([n, 50]), **parameters(rng))
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(50), sampler=sampler, priority_key="v", batch_size=8
    )
    buffer.set_rng(generator(rng))
    values = torch.randn(n, generator=generator(rng))
    if rng.random() < 0.3:
        values[rng.randrange(n)] = rng.choice([math.nan, math.inf, -math.inf])
    buffer.extend(TensorDict({"v": values}, [n]))
    return buffer, sampler


def sampler_call(rng):
    buffer, sampler = _filled(rng)
    n = rng.choice([1, 3, 5])
    index = torch.randint(len(buffer), (n,), generator=generator(rng))
    values = torch.randn(n, generator=generator(rng))
    method, arguments = rng.choice(
        [
            ("update_priority", {"index": index, "priority": values}),
            ("update_priority", {"index": index.tolist(), "priority": values.tolist()}),
            ("refresh", {"values": values, "index": index}),
            ("refresh", {"values": values[: len(buffer)]}),
            ("mark_update", {"index": index}),
            ("weights", {"size": len(buffer)}),
            ("sample", {"batch_size": rng.choice([1, 8, 10_000])}),
            ("set", {"temperature": 2.0, "top": 0.3, "min_value": None, "eps": 0.1}),
            ("set", {"mode": "soft", "alpha": 0.2, "beta": 0.1, "uniform_share": 0.3}),
            ("load_state_dict", sampler.state_dict()),
        ]
    )

    def run(a):
        if method == "sample":
            return sampler.sample(buffer.storage, a["batch_size"])
        if method == "load_state_dict":
            return sampler.load_state_dict(a)
        if method == "set":
            name = next(iter(sorted(a, key=lambda name: a[name] is arguments[name])))
            return setattr(sampler, name, a[name])
        return getattr(sampler, method)(**a)

    def check(a, out):
        """Weights are those of the definition, and draws have weight."""
        held = sampler.values[: len(buffer)]
        expected = value_weights(held, **sampler._parameters._asdict())
        if bool(held.isnan().all()):
            return
        weights = sampler.weights(len(buffer))
        torch.testing.assert_close(
            weights / weights.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-6
        )
        drawn, info = out if method == "sample" else sampler.sample(buffer.storage, 5)
        assert drawn.shape == info["priority_weight"].shape
        assert bool((weights[drawn] > 0).all())
        assert bool(info["priority_weight"].isfinite().all())

    guarded = (buffer.storage[:], sampler)
    return Case(arguments, run, check, guarded, ("index", "priority", "values"), REFUSALS)


def _rows_of(data):
    return data.contiguous() if isinstance(data, LazyStackedTensorDict) else data


def _keys(rng):
    options = {"reward_key": ("next", "reward"), "terminated_key": ("next", "terminated")}
    return pick(rng, {**options, "value_key": "state_value"})


def value(rng):
    setup = make_setup(rng)
    data = transitions(setup, rng.choice([(5,), (2, 3), ()]), rng)
    arguments = {"data": data, "value_network": make_critic(setup)}
    arguments |= {"gamma": rng.choice([0, 0.9, 1.0]), **_keys(rng)}
    arguments |= pick(rng, {"chunk_size": rng.choice([None, 1, 4])})

    def check(a, out):
        if isinstance(a["data"], TensorDict | LazyStackedTensorDict):
            assert out.shape == a["data"].shape
            assert not out.requires_grad
            same_network = a["value_network"] is arguments["value_network"]
            if same_network and all(
                bool((x.abs() < 1e15).all()) for x in _floats(a["data"]["next"])
            ):
                assert bool(out.isfinite().all()), "a NaN out of finite numbers"

    words = (*keys_of(data), "value_key", "state_value")
    return Case(arguments, lambda a: transition_value(**a), check, (setup.model,), words)


def _floats(data):
    return [x for x in data.values(True, True) if x.is_floating_point() and x.device.type == "cpu"]


def refresh(rng):
    setup = make_setup(rng)
    data = _rows_of(transitions(setup, (9,), rng))
    data["collector", "traj_ids"] = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    sampler = ValuePrioritizedSampler(20)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), sampler=sampler)
    arguments = {"data": data, "value_network": make_critic(setup), "buffer": buffer}
    options = {"target": rng.choice(["bootstrap", "return"]), "slice_size": rng.choice([3, 0.5])}
    options |= {"chunk_size": rng.choice([1, 4]), "done_key": ("next", "done"), "sampler": None}
    options |= {"trajectory_key": ("collector", "traj_ids")}
    arguments |= {"gamma": rng.choice([0, 0.9, 1.0]), **_keys(rng), **pick(rng, options)}

    def run(a):
        try:
            buffer.extend(a["data"])
        except Exception as error:  # TorchRL's own refusal
            raise ValueError(f"data: {error}") from error
        stored, values = buffer.storage[:].clone(), sampler.values
        options = {name: x for name, x in a.items() if name != "data"}
        try:
            made = ValueRefresh(**options)
            logs = [made() for _ in range(4)][-1]
        finally:
            assert bool((buffer.storage[:] == stored).all()) or not _comparable(stored)
        return logs, values

    def check(a, out):
        assert out[0]["refresh/share"] == 1.0
        finite = all(bool((x.abs() < 1e15).all()) for x in _floats(a["data"]["next"]))
        if a["buffer"] is buffer and finite:
            assert bool(sampler.values[: len(buffer)].isfinite().all())

    words = (*keys_of(data), "sampler", "value_key", "storage", "target", "trajectories")
    return Case(arguments, run, check, (setup.model,), words)


def _comparable(stored):
    return all(x.device.type == "cpu" and not x.isnan().any() for x in stored.values(True, True))


def checkpoint(rng):
    setup = make_setup(rng)
    buffer, sampler = _filled(rng)
    parts = {"model": setup.model, "buffer": buffer, "sampler": sampler, "random": generator(rng)}
    arguments = {"directory": "checkpoints", **pick(rng, {**parts, "progress": {"steps": 3}})}
    arguments |= {"keep_last": rng.choice([1, 2]), "step": rng.choice([0, 5, 10**6])}
    arguments |= pick(rng, {"metadata": {"note": "x", "share": 0.5}})
    if not set(arguments) & {*parts, "progress"}:
        arguments["model"] = setup.model

    def run(a):
        components = {name: x for name, x in a.items() if name not in ("step", "metadata")}
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                made = RecallCheckpoint(**components)
                made.save(a["step"], a.get("metadata"))
                return made.load_latest()
            finally:
                os.chdir(before)

    def check(a, step):
        assert step == a["step"]

    return Case(arguments, run, check, (setup.model, sampler), ("components", "step", "directory"))


def hook(rng):
    setup = make_setup(rng, flat_action=True)
    model, actor = setup.model, make_actor(setup)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20),
        sampler=ValuePrioritizedSampler(20),
        transform=BacktrackTransform(model, num_steps=2, generator=generator(rng)),
        batch_size=4,
    )
    loss = nn.Linear(1, 1)
    trainer = SimpleNamespace(
        loss_module=loss,
        optimizer=torch.optim.SGD([*loss.parameters(), *model.parameters()], lr=0.1),
        register_op=lambda *_: None,
        register_module=lambda *_: None,
        _log=lambda **_: None,
        collected_frames=10,
        collector=None,
    )
    recall_loss = RecallTraceLoss(actor)
    recall_loss.set_keys(action=model.action_key)
    arguments = {"recall_buffer": buffer, "recall_loss": recall_loss, "trainer": trainer}
    options = {"model_loss": BacktrackLoss(model), "extend": True, "refresh": lambda: {"age": 1.0}}
    arguments |= {**pick(rng, options), "batch": _rows_of(transitions(setup, (6,), rng))}

    def run(a):
        made = RecallTraceHook(**{k: x for k, x in a.items() if k not in ("trainer", "batch")})
        made.register(a["trainer"])
        made._begin_batch()
        made._extend(a["batch"])
        losses = made._add_terms(loss, (a["batch"],), TensorDict({"loss_a": torch.ones(())}))
        made.load_state_dict(made.state_dict())
        return losses

    def check(a, losses):
        extended = a.get("extend", True)
        assert ("loss_imitation" in losses) == (bool(extended) and len(buffer) > 0)
        assert all(bool(x.isfinite().all()) for x in losses.values())

    words = (*keys_of(arguments["batch"]), "trainer", "batch")
    return Case(arguments, run, check, (model, actor), words)


BUFFER_TARGETS = {
    "ValuePrioritizedSampler": sampler_init,
    "ValuePrioritizedSampler, calls": sampler_call,
    "transition_value": value,
    "ValueRefresh": refresh,
    "RecallCheckpoint": checkpoint,
    "RecallTraceHook": hook,
}

"""Traces: laid out as rollouts, random as asked, learned from by nothing; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Composite, OneHot, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from trace_data import (
    ACTIONS,
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


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_generator_decides(backend):
    model = make_model(stop=True)
    start = make_start(model, 600)

    def draw(generator):
        return sample_traces(model, start, num_steps=3, generator=generator, backend=backend)

    first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert_same(first, again, 0)
    for key in ("observation", "action"):
        assert not torch.allclose(first[key], other[key])
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    draw(generator)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert not torch.allclose(draw(generator)["action"], first["action"])


def test_without_a_generator_torchs_own_decides():
    model = make_model()
    start = make_start(model, 5)
    traces = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        traces.append(sample_traces(model, start, num_steps=3))
    assert_same(traces[0], traces[1], 0)
    assert not torch.allclose(traces[0]["action"], traces[2]["action"])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("kind", list(ExplorationType))
def test_the_global_exploration_type_does_not_matter(kind, backend):
    model = make_model()
    start, noise = make_start(model, 5), make_noise(model, 3, 5)
    expected = sample_traces(model, start, num_steps=3, noise=noise, backend=backend)
    with set_exploration_type(kind):
        found = sample_traces(model, start, num_steps=3, noise=noise, backend=backend)
    assert_same(found, expected, 0)


# Layout. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_traces", [None, 1, 4])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("observation", ["normal", "support"])
def test_a_trace_is_a_rollout_that_ends_in_its_start(observation, batch, num_traces):
    model = make_model(observation, "categorical", stop=True)
    start = make_start(model, *batch)
    trace = sample_traces(model, start, num_steps=5, num_traces=num_traces)
    rows = batch if num_traces is None else (*batch, num_traces)
    assert trace.shape == (*rows, 5)
    if num_traces is not None:
        start = start.unsqueeze(-2).expand(*rows, -1)
    following = trace["next", "observation"]
    assert torch.equal(following[..., -1, :], start)
    assert torch.equal(trace["observation"][..., 1:, :], following[..., :-1, :])
    assert trace["action"].shape == (*rows, 5)
    for key in ("action_log_prob", "delta_log_prob", ("collector", "mask")):
        assert trace[key].shape == (*rows, 5)
    assert trace["collector", "mask"].dtype == torch.bool
    if num_traces == 4:
        # Several traces of one start are not copies of each other.
        assert not torch.equal(
            trace["action_log_prob"][..., 0, :], trace["action_log_prob"][..., 1, :]
        )


@pytest.mark.parametrize("observation", ["normal", "support"])
def test_a_trace_is_an_ordinary_tensordict_with_memory_of_its_own(observation):
    model = make_model(observation, dtype=F32)
    for _ in range(2):  # the second walk of a size takes what the first has prepared
        trace = sample_traces(model, make_start(model, 5), num_steps=4)
        for part in (trace, trace["next"], trace["collector"]):
            assert part.device == torch.device("cpu")
            assert part.batch_size == (5, 4)
            assert not part.is_locked
        values = list(trace.values(True, True))
        assert all(value.is_contiguous() for value in values)
        assert len({value.untyped_storage().data_ptr() for value in values}) == len(values)
    trace.set_("action_log_prob", torch.ones(5, 4))
    trace["more"] = torch.zeros(5, 4, 1)
    assert_same(trace.clone(), trace, 0)


@pytest.mark.parametrize("observation", ["normal", "nested"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_a_trace_is_built_as_the_public_constructor_would(observation, is_plain, monkeypatch):
    """Whether or not the short cut past the constructor is taken."""
    monkeypatch.setattr("torchrl_recall.traces.sample._IS_PLAIN", is_plain)
    nested = Composite(seen=Composite(position=Unbounded(3)))
    model = BacktrackModel(nested if observation == "nested" else 3, 2, num_cells=(8,))
    trace = sample_traces(model, torch.randn(5, 3), num_steps=4)
    public = TensorDict(trace.to_dict(), (5, 4), device="cpu")
    for path in ((), ("next",), ("collector",)):
        ours, theirs = (td.get(path) if path else td for td in (trace, public))
        assert type(ours) is TensorDict
        assert set(ours.__dict__) == set(theirs.__dict__)
        state = [
            {k: v for k, v in td.__dict__.items() if k != "_tensordict"} for td in (ours, theirs)
        ]
        assert state[0] == state[1]
        assert list(ours.keys()) == list(theirs.keys())
        assert ours.names == theirs.names
    for one in (trace, public):
        one.names = ["rows", "time"]
        one.lock_()
        with pytest.raises(RuntimeError, match="lock"):
            one["next", "more"] = torch.zeros(5, 4)
        one.unlock_()
        one["next", "more"] = torch.zeros(5, 4)
    for way in (
        lambda td: pickle.loads(pickle.dumps(td)),
        copy.deepcopy,
        lambda td: td.to(torch.float64),
        lambda td: torch.stack([td, td]),
        lambda td: td[2:, -1],
        lambda td: td.exclude("next").flatten_keys(),
        lambda td: td.reshape(-1),
        torch.compile(lambda td: td.select("action_log_prob").exp(), backend="eager"),
    ):
        ours, theirs = way(trace), way(public)
        assert ours.batch_size == theirs.batch_size
        assert ours.names == theirs.names
        assert ours.device == theirs.device
        assert_same(ours, theirs, 0)


def test_keys_shapes_and_dtypes_are_those_of_the_environment():
    observation = Composite(
        camera=Unbounded((2, 2)), agent=Composite(speed=Unbounded(()), place=Unbounded((3,)))
    )
    model = BacktrackModel(
        observation, OneHot(3, dtype=torch.bool), num_cells=(8,), action_key=("agent", "act")
    )
    start = TensorDict(
        {
            "camera": torch.ones(4, 2, 2),
            "agent": {"speed": torch.ones(4), "place": torch.ones(4, 3)},
        },
        [4],
    )
    trace = sample_traces(model, start, num_steps=3)
    shapes = {
        "camera": (4, 3, 2, 2),
        ("agent", "speed"): (4, 3),
        ("agent", "place"): (4, 3, 3),
    }
    for key, shape in shapes.items():
        nested = key if isinstance(key, tuple) else (key,)
        assert trace[key].shape == trace[("next", *nested)].shape == shape
        assert bool((trace[("next", *nested)][:, -1] == 1).all())
    assert trace["agent", "act"].dtype == torch.bool
    assert bool((trace["agent", "act"].sum(-1) == 1).all())
    # One flat tensor of all keys will do as well.
    flat = sample_traces(model, torch.ones(4, 8), num_steps=3)
    assert bool((flat["next", "agent", "place"][:, -1] == 1).all())


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_log_probs_are_those_of_the_trace_as_real_data(observation, action, stop):
    model = make_model(observation, action, stop=stop)
    trace = sample_traces(model, make_start(model, 30), num_steps=4)
    with torch.no_grad():
        terms = model.step_log_prob(*model.read(trace))
    torch.testing.assert_close(trace["action_log_prob"], terms["action"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trace["delta_log_prob"], terms["delta"], rtol=1e-6, atol=1e-6)


def test_no_gradient_flows_through_a_trace():
    model = make_model(stop=True)
    start = make_start(model, 5).requires_grad_()
    for backend in ("reference", "eager"):
        trace = sample_traces(model, start, num_steps=3, backend=backend)
        assert not any(value.requires_grad for value in trace.values(True, True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_statistics_do_not_learn_from_traces():
    model = make_model(stop=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample_traces(model, make_start(model, 50), num_steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_the_model_changes_the_next_traces():
    model = make_model()
    start, noise = make_start(model, 5), make_noise(model, 3, 5)
    before = sample_traces(model, start, num_steps=3, noise=noise)
    data = TensorDict(
        {
            "observation": randn(8, 3),
            "action": randn(8, 2).tanh(),
            "next": {"observation": randn(8, 3)},
        },
        [8],
    )
    BacktrackLoss(model)(data)  # the statistics alone
    after = sample_traces(model, start, num_steps=3, noise=noise)
    assert not torch.allclose(after["observation"], before["observation"])


# What is refused. -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": -3}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int"),
        ({"num_steps": True}, TypeError, "num_steps must be an int"),
        ({"num_steps": None}, TypeError, "num_steps must be an int"),
        ({"num_traces": 0}, ValueError, "num_traces must be at least 1, got 0"),
        ({"num_traces": "2"}, TypeError, "num_traces must be an int"),
        ({"next_observation": torch.zeros(0, 3)}, ValueError, "next_observation is empty"),
        ({"next_observation": TensorDict({}, [2])}, KeyError, "'observation' is missing"),
        ({"next_observation": {}}, KeyError, "next_observation lacks"),
        ({"next_observation": [0.0] * 3}, TypeError, "next_observation must be a tensor"),
        ({"next_observation": torch.zeros(2, 4)}, ValueError, "next_observation has shape"),
        ({"next_observation": torch.zeros(())}, ValueError, "next_observation has shape"),
        ({"next_observation": torch.zeros(2, 3, dtype=F64)}, ValueError, "next_observation has d"),
        ({"next_observation": torch.zeros(2, 3, dtype=int)}, ValueError, "next_observation has d"),
        ({"next_observation": torch.full((2, 3), torch.nan)}, ValueError, "must be finite, got 6"),
        ({"next_observation": torch.full((2, 3), torch.inf)}, ValueError, "must be finite, got 6"),
        ({"next_observation": torch.zeros(2, 3, device="meta")}, ValueError, "is on device meta"),
        ({"backend": "native?"}, ValueError, "backend must be one of"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"model": nn.Linear(3, 3)}, TypeError, "model must be a BacktrackModel, got Linear"),
    ],
)
def test_refuses_by_name(arguments, error, message):
    model = make_model(dtype=F32)
    options = {"model": model, "next_observation": torch.zeros(2, 3), "num_steps": 4, **arguments}
    with pytest.raises(error, match=message):
        sample_traces(options.pop("model"), options.pop("next_observation"), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_refuses_a_generator_of_another_device():
    generator = torch.Generator("cuda")
    with pytest.raises(ValueError, match="generator is on device cuda"):
        sample_traces(make_model(), randn(2, 3), num_steps=2, generator=generator)


@pytest.mark.parametrize("part", ["action", "delta", "stop"])
@pytest.mark.parametrize("how", ["steps", "rows", "none"])
def test_refuses_noise_of_the_wrong_shape(part, how):
    model = make_model(stop=True)
    noise = make_noise(model, 4, 6)
    value = getattr(noise, part)
    wrong = {"steps": value[1:], "rows": value[:, :-1], "none": None}[how]
    with pytest.raises(ValueError, match=rf"noise\.{part} has shape"):
        sample_traces(model, randn(6, 3), num_steps=4, noise=noise._replace(**{part: wrong}))


def test_refuses_stop_noise_without_a_stop_head():
    noise = make_noise(make_model(stop=True), 4, 6)
    with pytest.raises(ValueError, match=r"noise\.stop has shape \(4, 6\), expected None"):
        sample_traces(make_model(), randn(6, 3), num_steps=4, noise=noise)

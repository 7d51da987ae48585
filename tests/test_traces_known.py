"""Calls of `sample_traces` that are like an earlier one take a short cut: it must not show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.traces import draw_noise, native
from torchrl_recall.traces.plan import MAX_KNOWN

pytestmark = pytest.mark.skipif(
    native.interface.load()[0] is None, reason="the C library is not there"
)


def make(kind: str) -> tuple[BacktrackModel, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "nested":
        model = BacktrackModel({("agent", "position"): 3}, 2, num_cells=(16, 16))
        return model, torch.randn(5, 3)
    if kind == "plain":
        return BacktrackModel(3, 2, num_cells=(16, 16)), torch.randn(5, 3)
    env = FourRoomsEnv(7, start="any", batch_size=(40,), seed=0)
    return BacktrackModel.from_env(env, num_cells=(16,)), env.reset()["observation"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def known(model: BacktrackModel) -> int:
    plan = native.plan_of(model)
    assert not isinstance(plan, str)
    return len(plan.known)


def assert_same(found, expected) -> None:
    keys = list(expected.keys(True))
    assert list(found.keys(True)) == keys
    assert found.batch_size == expected.batch_size
    assert found.device == expected.device
    for key in expected.keys(True, True):
        assert found[key].dtype == expected[key].dtype, key
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("options", [{}, {"num_traces": 3}, {"last_visit": True}], ids=str)
@pytest.mark.parametrize("kind", ["nested", "plain", "discrete"])
def test_the_second_call_gives_what_the_first_does(kind, options):
    model, start = make(kind)
    first = sample_traces(model, start, num_steps=6, generator=seeded(), **options)
    assert known(model) == 1
    again = [
        sample_traces(model, start, num_steps=6, generator=seeded(), **options) for _ in range(3)
    ]
    assert known(model) == 1
    for one in again:
        assert_same(one, first)
        assert one["action"].data_ptr() != first["action"].data_ptr()
    # Another way in, which takes no short cut.
    name = model.observation.keys[0]
    mapped = sample_traces(model, {name: start}, num_steps=6, generator=seeded(), **options)
    assert_same(mapped, first)


@pytest.mark.parametrize("kind", ["plain", "discrete"])
def test_the_global_generator_is_drawn_from_as_before(kind):
    model, start = make(kind)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append([sample_traces(model, start, num_steps=6) for _ in range(3)])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
    assert not torch.equal(results[0][0]["action"], results[0][1]["action"])


def test_other_sizes_and_options_are_other_calls():
    model, start = make("plain")
    shapes = set()
    for rows in (5, 2):
        for num_steps in (6, 1):
            for num_traces in (None, 1, 2):
                for _ in range(2):
                    out = sample_traces(
                        model, start[:rows], num_steps=num_steps, num_traces=num_traces
                    )
                    own = (rows,) if num_traces is None else (rows, num_traces)
                    assert out.shape == (*own, num_steps)
                    assert out["observation"].shape == (*own, num_steps, 3)
                    shapes.add(out.shape)
    assert len(shapes) == 12 == known(model)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"num_steps": True}, TypeError),
        ({"num_steps": 1.0}, TypeError),
        ({"num_traces": True}, TypeError),
        ({"last_visit": 0}, TypeError),
        ({"generator": 3}, TypeError),
        ({"backend": ["auto"]}, ValueError),
        ({"precision": None}, ValueError),
        ({"support": 3}, TypeError),
        ({"noise": 3}, TypeError),
    ],
    ids=str,
)
def test_what_is_equal_but_refused_stays_refused(changed, error):
    model, start = make("plain")
    good = {"num_steps": 1, "num_traces": 1}
    sample_traces(model, start, **good)
    with pytest.raises(error):
        sample_traces(model, start, **(good | changed))


@pytest.mark.parametrize("kind", ["plain", "discrete"])
def test_bad_starts_are_named(kind):
    model, start = make(kind)
    sample_traces(model, start, num_steps=2)
    bad = start.clone()
    bad[1] = torch.nan if kind == "plain" else 99
    with pytest.raises(ValueError, match="next_observation"):
        sample_traces(model, bad, num_steps=2)


def test_strides_and_other_dtypes_are_seen():
    model, start = make("plain")
    expected = sample_traces(model, start, num_steps=3, generator=seeded())
    wide = torch.stack([start, start], -1)[..., 0]
    assert not wide.is_contiguous()
    assert_same(sample_traces(model, wide, num_steps=3, generator=seeded()), expected)
    with pytest.raises(ValueError, match="dtype"):
        sample_traces(model, start.double(), num_steps=3)


@pytest.mark.parametrize("kind", ["plain", "discrete"])
@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_written_in_between_are_used(kind, threads, monkeypatch):
    """However they are written; against a model that never was another."""
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    model, start = make(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sample_traces(model, start, num_steps=30, generator=seeded())
        weight = model.delta_network[0].weight
        for write in (
            lambda: weight.data.numpy().__imul__(1.5),
            lambda: weight.detach().mul_(1.5),
            lambda: setattr(weight, "data", weight.data * 1.5),
            lambda: model.action_network[-1].bias.data.add_(1.0),
        ):
            old = sample_traces(model, start, num_steps=30, generator=seeded())
            write()
            found = sample_traces(model, start, num_steps=30, generator=seeded())
            other, _ = make(kind)
            other.load_state_dict(model.state_dict())
            assert_same(found, sample_traces(other, start, num_steps=30, generator=seeded()))
            assert not torch.equal(found["action_log_prob"], old["action_log_prob"])
    finally:
        torch.set_num_threads(before)


def test_a_model_built_otherwise_is_looked_at_again():
    model, start = make("plain")
    sample_traces(model, start, num_steps=3)
    seen = []
    hook = model.delta_network[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        sample_traces(model, start, num_steps=3)
    assert len(seen) == 3
    hook.remove()
    for i in (1, 3):
        model.delta_network[i] = nn.Tanh()
    torch.manual_seed(9)
    noise = draw_noise(model, 3, len(start))
    expected = sample_traces(model, start, num_steps=3, noise=noise, backend="reference")
    found = sample_traces(model, start, num_steps=3, noise=noise)
    torch.testing.assert_close(found["observation"], expected["observation"])


def test_few_calls_are_remembered():
    model, start = make("plain")
    for num_steps in range(1, MAX_KNOWN + 10):
        sample_traces(model, start, num_steps=num_steps)
    assert 0 < known(model) <= MAX_KNOWN


def test_noise_can_be_drawn_into_noise():
    model, _ = make("plain")
    first = draw_noise(model, 4, 6, seeded())
    place = draw_noise(model, 4, 6)
    again = draw_noise(model, 4, 6, seeded(), place)
    assert torch.equal(first.action, again.action)
    assert torch.equal(first.delta, again.delta)
    assert again.delta.data_ptr() == place.delta.data_ptr()


def test_eager_tiles_share_memory_but_not_their_results(monkeypatch):
    from torchrl_recall.traces import tiles

    model, _ = make("plain")
    start = torch.randn(50, 3)
    noise = draw_noise(model, 4, 50)
    whole = sample_traces(model, start, num_steps=4, noise=noise, backend="eager")
    drawn = sample_traces(model, start, num_steps=4, generator=seeded(), backend="eager")
    monkeypatch.setattr(tiles, "TILE", 16)
    tiled = sample_traces(model, start, num_steps=4, noise=noise, backend="eager")
    for key in whole.keys(True, True):
        torch.testing.assert_close(tiled[key], whole[key])
    many = sample_traces(model, start, num_steps=4, generator=seeded(), backend="eager")
    assert many["action"].unique(dim=0).shape[0] == 50 == drawn["action"].unique(dim=0).shape[0]

"""What holds for all valid inputs of every public class, whatever their shapes, keys and specs."""

from __future__ import annotations

import copy
import math
import random
import tempfile

import pytest
import torch
from fuzz_buffer_targets import BUFFER_TARGETS
from fuzz_targets import TARGETS
from generated import BATCHES, generator, make_actor, make_critic, make_setup, states, transitions
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mutations import digest
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall import (
    BacktrackLoss,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    ValueRefresh,
    sample_traces,
    transition_value,
)
from torchrl_recall.checkpoint import RecallCheckpoint
from torchrl_recall.priorities.weights import MODES, value_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:ValuePrioritizedSampler got:UserWarning"),
    pytest.mark.filterwarnings("ignore:sample_traces falls back:UserWarning"),
]
# Choices from a seed: hypothesis tries seeds, and a failing one names the case.
CHOICES = st.integers(0, 10**6).map(random.Random)
few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", sorted({**TARGETS, **BUFFER_TARGETS}))
@few
@given(rng=CHOICES)
def test_valid_calls_keep_the_contract(name, rng):
    """Shapes, dtypes, finite numbers, specs; and nothing that came in was changed."""
    case = {**TARGETS, **BUFFER_TARGETS}[name](rng)
    inputs = [x for x in case.arguments.values() if isinstance(x, torch.Tensor | TensorDict)]
    before = digest(inputs)
    result = case.run(case.arguments)
    case.check(case.arguments, result)
    if name not in ("BacktrackTransform", "ValueRefresh"):  # these add entries; see their checks
        assert digest(inputs) == before


@few
@given(rng=CHOICES)
def test_log_prob_is_the_sum_of_its_terms_and_of_one_row_each(rng):
    setup = make_setup(rng)
    data = transitions(setup, (4,), rng).contiguous()
    together = setup.model.log_prob(data)
    terms = setup.model(data.clone())["backtrack"]
    torch.testing.assert_close(sum(terms.values()), together, rtol=1e-4, atol=1e-4)
    one_by_one = torch.stack([setup.model.log_prob(data[i]) for i in range(4)])
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-4)


@few
@given(rng=CHOICES)
def test_backtrack_loss_ignores_masked_rows_whatever_they_hold(rng):
    setup = make_setup(rng)
    data = transitions(setup, (6,), rng).contiguous()
    kept = torch.tensor([True, False, True, True, False, True])
    data["collector", "mask"] = kept
    spoilt = data.clone()
    for key in (*setup.model.observation_keys, setup.model.action_key):
        value = spoilt[key]
        value[~kept] = math.nan if value.is_floating_point() else value.flatten()[0]
    loss = BacktrackLoss(setup.model).eval()
    expected = loss(data[kept].exclude("collector"))["loss_backtrack"]
    for batch in (data, spoilt):
        found = loss(batch)["loss_backtrack"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@few
@given(rng=CHOICES)
def test_recall_loss_is_the_mean_over_kept_steps(rng):
    setup = make_setup(rng, flat_action=True)
    actor = make_actor(setup)
    trace = transitions(setup, (3, 4), rng).contiguous().exclude("collector")
    kept = torch.rand(3, 4, generator=generator(rng)) < 0.6
    assume(bool(kept.any()))
    trace["collector", "mask"] = kept
    loss = RecallTraceLoss(actor)
    loss.set_keys(action=setup.model.action_key)
    found = loss(TensorDict({"trace": trace}, [3]))
    steps = [trace[i, t] for i in range(3) for t in range(4) if kept[i, t]]
    action = setup.model.action_key
    log_prob = [actor.get_dist(x).log_prob(x[action] * 1) for x in steps]
    expected = -torch.stack(log_prob).mean()
    torch.testing.assert_close(found["loss_imitation"], expected, rtol=1e-4, atol=1e-5)


@few
@given(rng=CHOICES, num_steps=st.integers(1, 6))
def test_walks_are_reproducible_and_rows_do_not_mix(rng, num_steps):
    setup = make_setup(rng)
    start = setup.model.observation.restore(states(setup, rng.choice(BATCHES), rng))
    seed = rng.randrange(1000)

    def walk(model):
        random = torch.Generator().manual_seed(seed)
        return sample_traces(model, start, num_steps=num_steps, generator=random)

    first = walk(setup.model)
    assert digest(walk(setup.model)) == digest(first)
    assert digest(walk(copy.deepcopy(setup.model))) == digest(first)
    for key, value in start.items():
        following = ("next", *key) if isinstance(key, tuple) else ("next", key)
        assert torch.equal(first[following].select(first.ndim - 1, -1), value)


@few
@given(rng=CHOICES)
def test_transform_masks_what_is_not_finite_and_only_that(rng):
    setup = make_setup(rng)
    data = transitions(setup, (5,), rng).contiguous().exclude("collector")
    assume(not setup.model.observation.is_discrete)
    key = setup.model.next_observation_keys[0]
    bad = torch.tensor([False, True, False, False, True])
    data[key][bad] = rng.choice([math.nan, math.inf, -math.inf])
    random = torch.Generator().manual_seed(0)
    transform = BacktrackTransform(setup.model, num_steps=3, generator=random)
    trace = transform(data)["trace"]
    assert not bool(trace["collector", "mask"][bad].any())
    assert all(bool(x.isfinite().all()) for x in trace.values(True, True))
    if not setup.model.has_stop and setup.kind != "lattice":
        assert bool(trace["collector", "mask"][~bad].all())


@few
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32) | st.just(math.nan), min_size=1, max_size=30),
    mode=st.sampled_from(MODES),
    top=st.floats(0.01, 1),
    temperature=st.floats(1e-3, 1e3),
    alpha=st.floats(0, 3),
    share=st.floats(0, 1),
    least=st.none() | st.floats(-10, 10),
)
def test_sampler_weighs_as_defined(values, mode, top, temperature, alpha, share, least):
    assume(not all(map(math.isnan, values)))
    n = len(values)
    options = {"mode": mode, "top": top, "temperature": temperature, "alpha": alpha}
    options |= {"uniform_share": share, "min_value": least}
    sampler = ValuePrioritizedSampler(n, **options)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n), sampler=sampler, batch_size=50)
    buffer.extend(TensorDict({"a": torch.arange(n)}, [n]))
    before = digest(buffer.storage[:])
    sampler.refresh(torch.tensor(values))
    expected = value_weights(torch.tensor(values), **options)
    weights = sampler.weights(n)
    torch.testing.assert_close(
        weights / weights.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-7
    )
    assert bool((weights[buffer.sample()["index"]] > 0).all())
    assert digest(buffer.storage[:]) == before
    restored = ValuePrioritizedSampler(n)
    restored.load_state_dict(sampler.state_dict())
    assert torch.equal(restored.weights(n), weights)


@few
@given(rng=CHOICES, gamma=st.floats(0, 1), chunk=st.integers(1, 9))
def test_values_are_those_of_the_definition(rng, gamma, chunk):
    setup = make_setup(rng)
    critic = make_critic(setup)
    data = transitions(setup, (9,), rng).contiguous()
    found = transition_value(data, critic, gamma=gamma, chunk_size=chunk)
    expected = []
    with torch.no_grad():
        for row in data.unbind(0):
            value = critic(row["next"].clone())["state_value"]
            ended = row["next", "terminated"]
            expected.append(row["next", "reward"] + (0 if ended else gamma * value))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)

    sampler = ValuePrioritizedSampler(20, dtype=torch.float64)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), sampler=sampler)
    buffer.extend(data)
    logs = ValueRefresh(buffer, critic, gamma=gamma, chunk_size=chunk)()
    assert logs["refresh/share"] == 1.0
    torch.testing.assert_close(sampler.values[:9].to(found), found)


@few
@given(rng=CHOICES)
def test_checkpoints_restore_every_number(rng):
    setup = make_setup(rng)
    sampler = ValuePrioritizedSampler(20)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20), sampler=sampler, priority_key="value_target"
    )
    buffer.extend(transitions(setup, (7,), rng).contiguous())
    source = generator(rng)
    kept = digest(setup.model, buffer.storage[:], sampler.state_dict(), source.get_state())
    with tempfile.TemporaryDirectory() as directory:
        parts = {"model": setup.model, "buffer": buffer, "source": source}
        checkpoint = RecallCheckpoint(directory, **parts)
        checkpoint.save(3)
        with torch.no_grad():
            for parameter in setup.model.parameters():
                parameter.add_(1.0)
        sampler.refresh(torch.zeros(7))
        buffer.extend(transitions(setup, (2,), rng).contiguous().exclude("collector"))
        torch.rand(3, generator=source)
        assert checkpoint.load_latest() == 3
    state = digest(setup.model, buffer.storage[:], sampler.state_dict(), source.get_state())
    assert state == kept

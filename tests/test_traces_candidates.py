"""Walks inside a support: their law against the exact one, and what the mask says."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy import stats
from torchrl.data import Categorical, MultiCategorical
from trace_data import F32, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.envs import FourRoomsEnv, backtrack_kernel, exact_backtrack_model
from torchrl_recall.traces.masks import last_visit

# Sampling tests fail a correct sampler this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-4
BACKENDS = ["reference", "eager", "table", "native", "auto"]
MASK = ("collector", "mask")


def everywhere(state):
    return torch.ones(len(state), dtype=torch.bool)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, probability, number):
    """p-value of counts; rare outcomes are pooled, impossible ones must not occur."""
    assert set(counts) <= {outcome for outcome, p in probability.items() if p > 0}
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)
    observed, expected, pool = [], [], [0.0, 0.0]
    for outcome, p in probability.items():
        if number * p >= 10:
            observed.append(counts.get(outcome, 0))
            expected.append(number * p)
        else:
            pool[0] += counts.get(outcome, 0)
            pool[1] += number * p
    if pool[1] > 0:
        observed.append(pool[0])
        expected.append(pool[1])
    expected = [e * sum(observed) / sum(expected) for e in expected]
    return stats.chisquare(observed, expected).pvalue


@pytest.fixture(scope="module")
def exact():
    """Four rooms with slip, and the exact backward model of a uniform policy."""
    env = FourRoomsEnv(5, slip=0.1, max_steps=None)
    policy = torch.full((25, 4), 0.25, dtype=torch.float64)
    return exact_backtrack_model(env, policy), backtrack_kernel(env, policy)


def walk_maze(model, number, num_steps, **options):
    start = torch.tensor([3, 3])
    trace = sample_traces(model, start, num_steps=num_steps, num_traces=number, **options)
    to_cell = torch.tensor([5, 1])
    cells = trace["observation"] @ to_cell
    return cells.tolist(), trace["action"].tolist(), trace[MASK].tolist()


def step_law(kernel, cell, inside=None, num_candidates=1):
    """Law of one step back: ``None`` for its end, else (action, cell before)."""
    given = kernel.predecessor[cell]
    if inside is not None:
        given = given * torch.tensor([float(c in inside) for c in range(25)])
    total = float(given.sum())
    stop, taken = float(kernel.stop[cell]), 1 - (1 - total) ** num_candidates
    law = {None: stop + (1 - stop) * (1 - taken)}
    for action, before in itertools.product(range(4), range(25)):
        p = float(given[action, before])
        if p > 0:
            law[action, before] = (1 - stop) * taken * p / total
    return law


def walk_law(kernel, num_steps, cell=18, **restriction):
    """Law of whole walks: tuples of steps, the newest first, shorter if they ended."""
    if num_steps == 0:
        return {(): 1.0}
    law = Counter()
    for step, p in step_law(kernel, cell, **restriction).items():
        if step is None:
            law[()] += p
            continue
        for rest, q in walk_law(kernel, num_steps - 1, step[1], **restriction).items():
            law[(step, *rest)] += p * q
    return law


def count_walks(model, number, num_steps, **options):
    counts = Counter()
    for cells, actions, kept in zip(*walk_maze(model, number, num_steps, **options), strict=True):
        walk = []
        for t in reversed(range(num_steps)):
            if kept[t]:
                assert len(walk) == num_steps - 1 - t  # once ended, never on
                walk.append((actions[t], cells[t]))
        counts[tuple(walk)] += 1
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_restriction_is_the_exact_posterior(exact, backend):
    """One candidate of a support that is always true: the law of the plain walk, stops included."""
    model, kernel = exact
    number, options = 20_000, {"support": everywhere, "num_candidates": 1, "backend": backend}
    counts = count_walks(model, number, 3, generator=generator(1), **options)
    assert chi_square(counts, walk_law(kernel, 3), number) > ERROR_RATE


def test_more_candidates_without_restriction_change_nothing(exact):
    """Stops are drawn once a step, not once a candidate, or fewer walks would stop."""
    model, kernel = exact
    # From the start cell, where one walk in many begins.
    start = torch.tensor([1, 1])
    trace = sample_traces(
        model, start, num_steps=1, num_traces=20_000, support=everywhere, num_candidates=6,
        generator=generator(2),
    )  # fmt: skip
    stop = float(kernel.stop[6])
    assert 0.05 < stop < 0.5
    assert stats.binomtest(int((~trace[MASK]).sum()), 20_000, stop).pvalue > ERROR_RATE
    counts = count_walks(
        model, 20_000, 3, generator=generator(3), support=everywhere, num_candidates=6
    )
    assert chi_square(counts, walk_law(kernel, 3), 20_000) > ERROR_RATE


@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_law_of_the_kept_candidate(exact, num_candidates, backend):
    """Inside A: the kernel restricted to A, and ``1 - (1 - q(A))^C`` for going on at all."""
    model, kernel = exact
    inside = {6, 8, 13, 17, 16}
    table = torch.tensor([c in inside for c in range(25)])

    def support(state):
        return table[state @ torch.tensor([5, 1])]

    number = 10_000
    options = {"support": support, "num_candidates": num_candidates, "backend": backend}
    counts = count_walks(model, number, 3, generator=generator(4), **options)
    law = walk_law(kernel, 3, inside=inside, num_candidates=num_candidates)
    assert {cell for walk in law for _, cell in walk} <= inside
    assert chi_square(counts, law, number) > ERROR_RATE


def test_law_on_three_states():
    """By hand: q(s) = (1/2, 1/3, 1/6), A = {1, 2}, two candidates."""
    model = BacktrackModel(Categorical(3), Categorical(2), num_cells=(4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        list(model.delta_network.children())[-1].bias.copy_(torch.tensor([3.0, 2.0, 1.0]).log())
    number = 30_000
    trace = sample_traces(
        model, torch.tensor(0), num_steps=1, num_traces=number, num_candidates=2,
        support=lambda s: s.squeeze(-1) > 0, generator=generator(5),
    )  # fmt: skip
    kept = trace[MASK].squeeze(-1)
    counts = Counter(
        s if k else None
        for s, k in zip(trace["observation"].flatten().tolist(), kept.tolist(), strict=True)
    )
    # q(A) = 1/2: three in four go on, by 2 : 1.
    probability = {None: 1 / 4, 1: 1 / 2, 2: 1 / 4}
    assert chi_square(counts, probability, number) > ERROR_RATE
    # The log-probability is the model's, not that of the restricted law.
    expected = torch.tensor([1 / 2, 1 / 3, 1 / 6]).log()[trace["observation"].flatten()]
    torch.testing.assert_close(trace["delta_log_prob"].flatten()[kept], expected[kept])


@pytest.mark.parametrize("member_per", ["step", "trace"])
@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_law_of_an_ensemble(member_per, backend):
    """By hand: members of laws q and r, a member for each step or trace, A = {1, 2}."""
    model = BacktrackModel(
        Categorical(3), Categorical(2), num_cells=(4,), stop=True, num_members=2,
        member_per=member_per,
    )  # fmt: skip
    laws, stops = [[1 / 2, 1 / 3, 1 / 6], [1 / 10, 1 / 10, 4 / 5]], [1 / 4, 1 / 2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for i in range(2):
            networks = model.member(i)
            list(networks.delta_network.children())[-1].bias.copy_(torch.tensor(laws[i]).log())
            logit = torch.tensor(stops[i]).logit()
            list(networks.stop_network.children())[-1].bias.fill_(logit)
    number, num_candidates = 15_000, 2
    trace = sample_traces(
        model, torch.tensor(0), num_steps=2, num_traces=number, num_candidates=num_candidates,
        support=lambda s: s.squeeze(-1) > 0, generator=generator(9), backend=backend,
    )  # fmt: skip
    counts = Counter()
    for s, kept in zip(trace["observation"].tolist(), trace[MASK].tolist(), strict=True):
        counts[tuple(s[t] for t in (1, 0) if kept[t])] += 1

    def step(i):
        inside = laws[i][1] + laws[i][2]
        goes = (1 - stops[i]) * (1 - (1 - inside) ** num_candidates)
        return {None: 1 - goes, **{s: goes * laws[i][s] / inside for s in (1, 2)}}

    pairs = itertools.product(range(2), repeat=2)
    pairs = [pair for pair in pairs if member_per == "step" or pair[0] == pair[1]]
    law = Counter()
    for first, second in pairs:
        one, two = step(first), step(second)
        law[()] += one[None] / len(pairs)
        for s in (1, 2):
            law[s,] += one[s] * two[None] / len(pairs)
            for before in (1, 2):
                law[s, before] += one[s] * two[before] / len(pairs)
    assert chi_square(counts, law, number) > ERROR_RATE


KINDS = [
    ("normal", "tanh"),
    ("lattice", "normal"),
    ("support", "categorical"),
    ("class", "one_hot"),
]


@pytest.mark.parametrize(("observation", "action"), KINDS)
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_masks_and_columns_fit_together(observation, action, stop, last):
    model = make_model(observation, action, dtype=F32, stop=stop)
    start = make_start(model, 50)

    def support(state):
        # Some half of the states, of any kind.
        return (state.double().sum(-1) * 7.3).sin() > -0.2

    options = {"num_steps": 6, "support": support, "num_candidates": 3, "last_visit": last}
    trace = sample_traces(model, start, num_traces=2, generator=generator(6), **options)
    again = sample_traces(model, start, num_traces=2, generator=generator(6), **options)
    other = sample_traces(model, start, num_traces=2, generator=generator(7), **options)
    assert (trace == again).all()
    assert not (trace == other).all()
    assert trace.shape == (50, 2, 6)
    assert all(torch.isfinite(value).all() for value in trace.values(True, True))
    codec = model.observation
    before = codec.read(trace)
    after = codec.read(trace, model.next_observation_keys)
    assert torch.equal(before[..., 1:, :], after[..., :-1, :])
    assert torch.equal(after[..., -1, :], codec.flatten(start, "").unsqueeze(1).expand(-1, 2, -1))
    kept = trace[MASK]
    inside = support(before.reshape(-1, before.shape[-1])).reshape(kept.shape)
    assert not (kept & ~inside).any()
    assert 0.05 < kept.double().mean() < 0.95
    if last and observation != "normal":
        # Where the walk was alive, the mask is last visit of the whole walk and nothing else.
        alive = sample_traces(
            model, start, num_traces=2, generator=generator(6), **options | {"last_visit": False}
        )[MASK]
        states = torch.cat([before, after[..., -1:, :]], -2)
        assert torch.equal(kept, alive & last_visit(states))
    else:
        # Once ended, never on again: False, ..., False, True, ..., True.
        assert bool((kept[..., 1:] >= kept[..., :-1]).all())
    # The model's own log-probabilities of the steps that were taken.
    model_says = model.step_log_prob(*model.read(trace))
    for name in ("action", "delta"):
        torch.testing.assert_close(
            trace[f"{name}_log_prob"][kept], model_says[name][kept], rtol=1e-3, atol=1e-3
        )


def test_an_ended_trace_holds_where_it_ended():
    model = make_model(dtype=F32)
    start = make_start(model, 4)
    calls = []

    def support(state):
        calls.append(len(state))
        return torch.full((len(state),), len(calls) <= 2)

    trace = sample_traces(model, start, num_steps=5, support=support, num_candidates=3)
    assert calls == [12] * 5
    assert trace[MASK].tolist() == [[False, False, False, True, True]] * 4
    ended = trace["observation"][:, 3:4].expand(-1, 3, -1)
    assert torch.equal(trace["observation"][:, :3], ended)
    assert torch.equal(trace["next", "observation"][:, :3], ended)


def test_more_candidates_keep_longer_traces():
    model = make_model(dtype=F32)
    lengths = []
    for number in (1, 2, 4, 16):
        trace = sample_traces(
            model, make_start(model, 400), num_steps=8, num_candidates=number,
            support=lambda s: s[:, 0] > s[:, 1], generator=generator(8),
        )  # fmt: skip
        lengths.append(float(trace[MASK].sum(-1).double().mean()))
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0] + 1


class TestDeadEndsAndOverflow:
    def test_dead_end(self):
        """A displacement to the right only: from column 0 nothing can have come."""
        model = BacktrackModel(
            MultiCategorical([4]), Categorical(2), delta_support=torch.tensor([[-1]])
        )
        trace = sample_traces(
            model, torch.tensor([[2]]), num_steps=4, support=everywhere, num_candidates=3
        )
        assert trace[MASK].tolist() == [[False, False, True, True]]
        assert trace["observation"].flatten().tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("backend", ["reference", "native"])
    def test_numbers_that_overflow_later(self, backend):
        """Each step back multiplies the state by 1e15: the third leaves the numbers."""
        model = BacktrackModel(1, 1, num_cells=(), delta_log_scale_range=(-20.0, -19.0))
        with torch.no_grad():
            for network in (model.delta_network, model.action_network):
                for parameter in network.parameters():
                    parameter.zero_()
            list(model.delta_network.children())[-1].weight[0, 0] = 1e15
        trace = sample_traces(
            model, torch.ones(3, 1), num_steps=6, support=everywhere, backend=backend
        )
        assert trace[MASK].tolist() == [[False] * 4 + [True] * 2] * 3
        assert all(torch.isfinite(value).all() for value in trace.values(True, True))

    def test_no_first_step(self):
        model = make_model(dtype=F32)
        with torch.no_grad():
            list(model.delta_network.children())[-1].bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="gives NaN or infinite numbers"):
            sample_traces(model, make_start(model, 3), num_steps=2, support=everywhere)


class TestArguments:
    def test_refusals(self):
        model = make_model(dtype=F32)
        start = make_start(model, 3)
        options = {"num_steps": 2}
        with pytest.raises(ValueError, match="noise is for one predecessor a step"):
            sample_traces(
                model, start, **options, noise=make_noise(model, 2, 3), support=everywhere
            )
        with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
            sample_traces(model, start, **options, support=everywhere, num_candidates=0)
        with pytest.raises(TypeError, match="support must be callable, got list"):
            sample_traces(model, start, **options, support=[])
        with pytest.raises(ValueError, match=r"support gave torch.bool of shape \(12, 3\)"):
            sample_traces(model, start, **options, support=lambda s: s > 0)
        with pytest.raises(ValueError, match=r"support gave torch.float32 of shape \(12,\)"):
            sample_traces(model, start, **options, support=lambda s: s[:, 0])
        with pytest.raises(TypeError, match="support must return a bool tensor, got bool"):
            sample_traces(model, start, **options, support=lambda s: True)
        start[1] = torch.nan
        with pytest.raises(ValueError, match="next_observation must be finite"):
            sample_traces(model, start, **options, support=everywhere)

    def test_double_precision_and_torch_own_randomness(self):
        model = make_model()
        torch.manual_seed(3)
        trace = sample_traces(model, make_start(model, 3), num_steps=2, support=everywhere)
        torch.manual_seed(3)
        again = sample_traces(model, make_start(model, 3), num_steps=2, support=everywhere)
        assert trace["observation"].dtype == torch.float64
        assert (trace == again).all()

    def test_no_gradient(self):
        model = make_model(dtype=F32)
        trace = sample_traces(model, make_start(model, 3), num_steps=2, support=everywhere)
        assert not any(value.requires_grad for value in trace.values(True, True))

    def test_off_is_the_plain_walk(self):
        """Not a number of the random stream is used up by an option that is off."""
        for observation, action in (("normal", "tanh"), ("support", "categorical")):
            model = make_model(observation, action, dtype=F32, stop=True)
            start = make_start(model, 9)
            one = sample_traces(model, start, num_steps=3, generator=generator(1))
            other = sample_traces(
                model, start, num_steps=3, generator=generator(1), support=None, num_candidates=9
            )
            assert (one == other).all()

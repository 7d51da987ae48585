"""The off-policy hosts against what they are made of, and short runs of every row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import PrioritizedSampler

from bench.learning.continuous import off_policy_rows, off_policy_traces, step_profile
from bench.learning.continuous.off_policy import OffPolicy, OffPolicySettings, Replay
from bench.learning.continuous.off_policy_rows import OFF_POLICY_TASKS, VARIANTS
from bench.learning.continuous.off_policy_traces import (
    ReplayRecallSettings,
    ReplayTraces,
    ValuedStarts,
)
from bench.learning.continuous.step_profile import Stopwatch
from bench.learning.continuous.tasks import TASKS
from bench.learning.mujoco import tasks as mujoco_tasks

SMALL = OffPolicySettings(
    num_envs=4, rollout_steps=4, batch_size=32, first_steps=64, guide_every=64, updates=1
)
FEW = {"first_model_steps": 2, "model_steps": 2, "num_traces": 4, "num_references": 16}


def made_host(name: str = "u_maze", algorithm: str = "sac", **options) -> OffPolicy:
    task = replace(TASKS[name], num_tests=2)
    return OffPolicy(task, 0, SMALL, algorithm, budget=256, **options)


class TestHost:
    def test_action_value_is_the_smaller_of_the_target_critics(self):
        host = made_host()
        data = TensorDict({"observation": torch.rand(5, 2), "action": torch.rand(5, 2)}, [5])
        shift, scale = host.qvalue.module.shift, host.qvalue.module.scale
        inputs = torch.cat([(data["observation"] - shift) / scale, data["action"]], -1)
        params = host.rl_loss.target_qvalue_network_params["module", "layers"]
        found = []
        for net in range(2):
            x = inputs
            for layer in ("0", "2", "4"):
                x = x @ params[layer, "weight"][net].T + params[layer, "bias"][net]
                x = x if layer == "4" else x.relu()
            found.append(x)
        assert not torch.allclose(*found)
        torch.testing.assert_close(host.action_value(data), torch.minimum(*found))
        loc = host.policy(data["observation"])[0]
        expected = host.action_value(data.set("action", torch.tanh(loc)))
        found_value = host.critic(data.select("observation"))["state_value"]
        torch.testing.assert_close(found_value, expected)

    def test_counts_of_steps_and_updates(self):
        host = made_host()
        for _ in range(16):
            host.iterate()
        # The first update comes with 64 steps of 256, then one each 16 steps.
        assert len(host.history) == 256
        assert host.num_updates == 13

    def test_one_update_is_the_losses_gradient_step(self):
        host, other = made_host(), made_host()
        for one in (host, other):
            for _ in range(3):
                one.iterate()
        batch = host.history.data[:32]
        host.history.buffer.sample = lambda: batch.clone()
        torch.manual_seed(1)
        host._update()
        torch.manual_seed(1)
        losses = other.rl_loss(batch.clone())
        total = losses["loss_qvalue"] + losses["loss_actor"] + losses["loss_alpha"]
        optimizer = torch.optim.Adam(other.rl_loss.parameters(), lr=SMALL.learning_rate)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        pairs = zip(host.rl_loss.parameters(), other.rl_loss.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)

    def test_td3_explores_by_noise_and_is_scored_without(self):
        host = made_host(algorithm="td3")
        state = torch.rand(3, 2)
        loc, scale = host.policy(state)
        assert (scale == SMALL.noise).all()
        action = host.actor(TensorDict({"observation": state}, [3]))["action"]
        torch.testing.assert_close(action, torch.tanh(loc))
        assert host.evaluate() == host.evaluate()

    def test_unknown_algorithm(self):
        with pytest.raises(ValueError, match="algorithm must be 'sac' or 'td3', got 'ddpg'"):
            made_host(algorithm="ddpg")


class TestReplay:
    def test_priorities_are_the_td_errors(self):
        host = made_host(replay=Replay(0.6, 0.4))
        for _ in range(3):
            host.iterate()
        sampler = host.history.buffer.sampler
        assert isinstance(sampler, PrioritizedSampler)
        batch = host.history.buffer.sample()
        drawn, index = host.rl_loss(batch), batch["index"]
        assert drawn["loss_qvalue"].isfinite()
        host.history.buffer.update_tensordict_priority(batch)
        error = batch["td_error"].flatten()
        last = {int(i): float(e) for i, e in zip(index, error, strict=True)}
        rows = torch.tensor(list(last))
        expected = (torch.tensor(list(last.values())) + 1e-8) ** 0.6
        found = torch.as_tensor(sampler._sum_tree[rows.numpy()])
        ratio = found / expected
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=0.0)


def told_values() -> TensorDictModule:
    """Values of states: their first coordinate, divided by ten."""
    return TensorDictModule(lambda x: x[..., :1] / 10, ["observation"], ["state_value"])


class TestWeights:
    def made_guide(self, **options) -> ReplayTraces:
        guides = []

        def make(host):
            guides.append(ReplayTraces(host, ReplayRecallSettings(**FEW, **options)))
            return guides[0]

        host = made_host(make_guide=make)
        for _ in range(3):
            host.iterate()
        host.critic = told_values()
        return guides[0]

    def test_relative_gap_by_hand(self):
        guide = self.made_guide(frontier=False)
        data = guide.history.data
        data["next", "reward"][:2] = torch.tensor([[1.0], [0.0]])
        data["next", "terminated"][:2] = torch.tensor([[True], [True]])
        guide.chosen.drawn = torch.tensor([0, 1])
        place = torch.tensor([[[2.0, 0.0], [9.0, 0.0], [12.0, 0.0]]]).expand(2, 3, 2)
        trace = TensorDict({"observation": place, "action": torch.zeros(2, 3, 2)}, [2, 3])
        gamma = SMALL.gamma
        # Returns gamma^2, gamma and 1 against values of .2, .9 and 1.2; the other start promises 0.
        expected = torch.tensor([[1 - 0.2 / gamma**2, 1 - 0.9 / gamma, 0.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(guide._weight(trace), expected)

    def test_advantage_by_hand(self):
        guide = self.made_guide(frontier=False, gate="advantage")
        guide.chosen.drawn = torch.tensor([0])
        guide.host.action_value = lambda data: data["action"][..., :1]
        place = torch.tensor([[[2.0, 0.0], [9.0, 0.0]]])
        action = torch.tensor([[[0.5, 0.0], [0.5, 0.0]]])
        trace = TensorDict({"observation": place, "action": action}, [1, 2])
        torch.testing.assert_close(guide._weight(trace), torch.tensor([[0.3, 0.0]]))

    def test_to_the_frontier_all_steps_count(self):
        guide = self.made_guide()
        assert guide.is_exploring
        trace = TensorDict({"observation": torch.zeros(2, 3, 2)}, [2, 3])
        assert (guide._weight(trace) == 1).all()

    def test_where_rewards_come_all_the_time_nothing_is_imitated(self):
        guide = self.made_guide(near_steps=8)
        latest = guide.history.data["next", "reward"]
        latest[-32:] = -1.0  # the last eight steps of each of four environments
        guide.update(guide.history.data[:0])
        assert guide.host.log["reward_nearness"][-1] == 1.0
        assert guide.steps is None
        assert guide.loss() is None

    @pytest.mark.parametrize("name", ["half_cheetah_delayed", "hopper_dense"])
    def test_where_rewards_are_near_the_run_is_the_plain_one(self, name):
        # To the bit: the guide draws from streams of its own.
        pytest.importorskip("mujoco")
        task = replace(mujoco_tasks.TASKS[name], num_tests=1)
        # A first rollout of 32 steps: none without a payment.
        settings = replace(SMALL, num_envs=8, gamma=0.99, guide_every=256)
        found = []
        for make in (None, lambda host: ReplayTraces(host, ReplayRecallSettings(**FEW))):
            host = OffPolicy(task, 0, settings, "sac", make, budget=1024)
            found.append((host.train()["score"], list(host.rl_loss.parameters())))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
        # Paid every 20 steps, or at each.
        near = sum(0.99**k for k in range(20)) / 20 if "delayed" in name else 1.0
        assert host.log["reward_nearness"][-1] == pytest.approx(near, abs=0.02)
        assert host.num_updates > 20

    @pytest.mark.parametrize("near", [0.9, 0.84, 0.83, 0.5])
    def test_what_rewards_leave_open(self, near, monkeypatch):
        """Weights are scaled by 1 - n, down to a sixth: below that nothing is imitated."""
        guide = self.made_guide()
        monkeypatch.setattr(off_policy_traces, "reward_nearness", lambda data, gamma: near)
        guide.update(guide.history.data[:0])
        if near > 5 / 6:
            assert guide.steps is None
        else:
            assert guide.steps is not None
            expected = torch.full_like(guide.steps["weight"], 1 - near)
            torch.testing.assert_close(guide.steps["weight"], expected)

    def test_imitation_is_that_of_the_kept_steps(self):
        guide = self.made_guide(imitation_coeff=0.5, imitation_batch=64)
        action = torch.tensor([[0.3, -0.2]])
        steps = {"observation": torch.ones(1, 2), "action": action, "weight": torch.tensor([0.25])}
        guide.steps = TensorDict(steps, [1])
        loc, scale = guide.host.policy(torch.ones(1, 2))
        normal = torch.distributions.Normal(loc, scale)
        jacobian = torch.log1p(-action.square()).sum(-1)
        expected = -(normal.log_prob(torch.atanh(action)).sum(-1) - jacobian)
        loss = guide.loss()
        assert loss is not None
        torch.testing.assert_close(loss, 0.5 * 0.25 * expected[0])


def test_valued_starts_are_the_best_share():
    host = made_host()
    for _ in range(3):
        host.iterate()
    host.critic = told_values()
    starts = ValuedStarts(host, top=0.1)
    generator = torch.Generator().manual_seed(0)
    found = starts(TensorDict({}, [200]), generator)
    data = host.history.data["next"]
    value = data["reward"] + SMALL.gamma * (~data["terminated"]) * data["observation"][:, :1] / 10
    best = set(value[:, 0].topk(5).indices.tolist())  # of 48 steps, rounded up
    assert starts.drawn is not None
    assert value[starts.drawn].min() >= value[:, 0].topk(5).values.min()
    assert set(starts.drawn.tolist()) <= best
    assert torch.equal(found["observation"], data["observation"][starts.drawn])


ROWS = [(name, "sac", v) for name, task in OFF_POLICY_TASKS.items() for v in task.variants]


@pytest.mark.parametrize(
    ("task_name", "algorithm", "variant_name"),
    [
        *ROWS,
        ("u_maze", "td3", "per"),
        ("half_cheetah", "td3", "traces"),
    ],
)
def test_rows_train(task_name: str, algorithm: str, variant_name: str):
    if OFF_POLICY_TASKS[task_name].task.mujoco:
        pytest.importorskip("mujoco")
    row, variant = OFF_POLICY_TASKS[task_name], VARIANTS[variant_name]
    settings = variant.options.get("settings")
    if settings is not None:
        variant = replace(variant, options={"settings": replace(settings, **FEW)})
    task = replace(row.task, num_tests=2)
    host = OffPolicy(task, 0, SMALL, algorithm, variant.make(), variant.replay, budget=160)
    before = [p.detach().clone() for p in host.policy.parameters()]
    for _ in range(10):
        host.iterate()
    after = list(host.policy.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if settings is not None:
        assert host.log["trace_kept"]


def test_often_is_the_same_learner_with_more_updates():
    rows = {(e.task, e.name): e for e in off_policy_rows.entries()}
    few, many = (rows["u_maze", f"{name}/traces"].definition for name in ("sac", "sac_often"))
    assert many["host"] == {**few["host"], "updates": 8 * few["host"]["updates"]}
    assert {**many, "host": few["host"]} == few


class TestProfile:
    def test_time_inside_an_inner_call_is_its_own(self):
        clock = iter([0.0, 1.0, 4.0, 9.0, 9.0, 11.0])
        watch = Stopwatch(lambda: next(clock))

        class Host:
            def outer(self):
                return self.inner() + 1

            def inner(self):
                return 1

        host = Host()
        watch.wrap(host, "outer", "rest")
        watch.wrap(host, "inner", "inside")
        assert host.outer() == 2
        # Outer from 0 to 1, inner to 4, outer to 9; the next call begins at 9 and ends at 11.
        assert watch.parts == {"rest": 6.0, "inside": 3.0}
        assert host.inner() == 1
        assert watch.parts == {"rest": 6.0, "inside": 5.0}

    def test_summary_and_figure_from_what_was_measured(self, tmp_path):
        hosts = {
            "sac": {
                "without": {"losses": 100.0, "backward": 100.0},
                "with": {"losses": 100.0, "backward": 100.0, "imitation": 50.0},
            }
        }
        assert step_profile.summary(hosts) == [
            "SAC: 5,000 steps/s without traces, 4,000 with, 1.25 times the time"
        ]
        paths = [tmp_path / "one.png", tmp_path / "two.png"]
        for path in paths:
            step_profile.draw({"tasks": {"u_maze": hosts}}, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()

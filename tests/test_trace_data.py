"""Traces as transitions: exact targets in a maze, junk that TorchRL's losses must never see."""

from __future__ import annotations

import pytest
import torch
from loss_data import ACTIONS, WIDTH, close, make_actor, recall, same
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Unbounded
from torchrl.modules import QValueActor, ValueOperator
from torchrl.objectives import A2CLoss, DDPGLoss, DQNLoss, SACLoss
from torchrl.objectives.value import GAE

from torchrl_recall import AdvantageWeight, BacktrackModel, sample_traces, trace_transitions
from torchrl_recall.envs import FourRoomsEnv, exact_backtrack_model
from torchrl_recall.imitation.weights import ImitationKeys

GAMMA = 0.9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reward_of(trace):
    return trace["next", "observation"].sum(-1)


def ends_of(trace):
    return trace["next", "observation"][..., :1] > 2


def with_junk(data):
    """The same traces with NaN where they are masked; every trace's last step is real."""
    trace = data["trace"].clone()
    masked = ~trace["collector", "mask"]
    for key in ("observation", "action", ("next", "observation")):
        trace[key][masked] = torch.nan
    return trace


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH + ACTIONS, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def make_host(which):
    """One of TorchRL's losses, with ends and rewards under their usual names."""
    critic = ValueOperator(Pair(), in_keys=["observation", "action"])
    if which == "sac":
        return SACLoss(make_actor(), critic, action_spec=Unbounded(ACTIONS), delay_qvalue=False)
    actor = TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["observation"], ["action"])
    return DDPGLoss(actor, critic, delay_actor=False, delay_value=False)


class TestTransitions:
    @pytest.mark.parametrize("batch", [(6,), (4, 5), (3, 2, 5)])
    def test_entries(self, batch):
        trace = recall(*batch)["trace"]
        flat = trace_transitions(trace, reward=reward_of, terminated=ends_of)
        assert flat.shape == (torch.Size(batch).numel(),)
        close(flat["next", "reward"], reward_of(trace).reshape(-1, 1))
        assert torch.equal(flat["next", "terminated"], ends_of(trace).reshape(-1, 1))
        assert torch.equal(flat["next", "done"], flat["next", "terminated"])
        assert not flat["next", "truncated"].any()
        for key in ("observation", "action", ("next", "observation"), ("collector", "mask")):
            assert torch.equal(flat[key], trace[key].reshape(-1, *trace[key].shape[len(batch) :]))
        rollout = trace_transitions(trace, reward=reward_of, terminated=ends_of, flatten=False)
        assert rollout.shape == batch
        assert torch.equal(rollout["next", "terminated"], ends_of(trace))
        last = rollout[..., -1]["next"]
        assert torch.equal(last["truncated"], ~last["terminated"])
        assert last["done"].all()
        assert not rollout[..., :-1]["next", "truncated"].any()

    def test_sampled_traces(self):
        """The model's log-probabilities would pass for the policy's."""
        trace = sample_traces(
            BacktrackModel(WIDTH, ACTIONS, num_cells=(8,)), torch.zeros(4, WIDTH), num_steps=6
        )
        before = trace.clone()
        data = trace_transitions(trace, reward=reward_of)
        assert data.shape == (24,)
        assert {"action_log_prob", "delta_log_prob"} <= set(trace.keys())
        assert not {"action_log_prob", "delta_log_prob"} & set(data.keys())
        assert not data["next", "terminated"].any()
        assert same(trace, before)

    def test_renamed_entries(self):
        trace = recall(4, 5)["trace"]
        keys = {"reward_key": ("next", "a", "r"), "done_key": ("next", "a", "d")}
        keys |= {"terminated_key": ("next", "a", "t"), "truncated_key": ("next", "a", "u")}
        data = trace_transitions(trace, reward=reward_of, flatten=False, **keys)
        assert set(data["next", "a"].keys()) == {"r", "d", "t", "u"}
        assert data["next", "a", "d"][:, -1].all()

    def test_junk_where_masked_becomes_a_kept_step(self):
        data = recall(4, 5)
        plain = trace_transitions(data["trace"], reward=reward_of, terminated=ends_of)
        got = trace_transitions(with_junk(data), reward=reward_of, terminated=ends_of)
        kept = plain["collector", "mask"]
        assert same(got[kept], plain[kept])
        assert all(value.isfinite().all() for value in got.values(True, True))
        first = plain[kept][0]
        assert torch.equal(
            got["observation"][~kept], first["observation"].expand(int((~kept).sum()), -1)
        )
        data["trace", "collector", "mask"][:] = False
        empty = trace_transitions(with_junk(data), reward=reward_of)
        assert same(empty["observation"], 0)

    def test_wrong_arguments(self):
        trace = recall(4, 5)["trace"]
        with pytest.raises(TypeError, match="reward must be callable, got float"):
            trace_transitions(trace, reward=1.0)
        with pytest.raises(TypeError, match="reward must give a tensor, got float"):
            trace_transitions(trace, reward=lambda trace: 1.0)
        with pytest.raises(ValueError, match=r"reward has shape \(4,\)"):
            trace_transitions(trace, reward=lambda trace: torch.ones(4))
        with pytest.raises(ValueError, match=r"terminated has shape \(4, 5, 3\)"):
            trace_transitions(
                trace, reward=reward_of, terminated=lambda trace: trace["observation"]
            )
        with pytest.raises(ValueError, match="reward must be finite at kept steps"):
            trace_transitions(trace, reward=lambda trace: torch.full((4, 5), torch.nan))
        nameless = TensorDictModule(nn.Linear(WIDTH, 1), ["observation"], ["r"])
        with pytest.raises(KeyError, match=r"reward module writes no \('next', 'reward'\)"):
            trace_transitions(trace, reward=nameless)
        with pytest.raises(ValueError, match="trace has no time dimension"):
            trace_transitions(trace[0, 0], reward=reward_of)
        trace["observation"][trace["collector", "mask"]] = torch.nan
        with pytest.raises(ValueError, match="trace 'observation' must be finite at kept steps"):
            trace_transitions(trace, reward=reward_of)


class TestHosts:
    @pytest.mark.parametrize("which", ["sac", "ddpg"])
    def test_off_policy_losses_see_kept_steps_only(self, which):
        host, data = make_host(which), recall(4, 5)
        flat = trace_transitions(with_junk(data), reward=reward_of, terminated=ends_of)
        out = host(flat)
        total = sum(value for key, value in out.items() if key.startswith("loss_"))
        total.backward()
        assert torch.isfinite(total)
        assert all(p.grad is None or p.grad.isfinite().all() for p in host.parameters())
        if which == "ddpg":
            # (SAC draws an action for each row, so other rows have other ones.)
            kept = flat["collector", "mask"]
            expected = host(flat[kept].exclude("collector"))
            for key in ("loss_value", "loss_actor"):
                close(out[key], expected[key], rtol=1e-5, atol=1e-6)

    def test_generalized_advantages(self):
        """GAE and A2C on rollouts; the targets by a loop over the definition."""
        critic, data = ValueOperator(nn.Linear(WIDTH, 1)), recall(4, 5)
        data["trace", "collector", "mask"][:, -1] = True
        rollout = trace_transitions(
            data["trace"], reward=reward_of, terminated=ends_of, flatten=False
        )
        with torch.no_grad():
            GAE(gamma=GAMMA, lmbda=0.8, value_network=critic)(rollout)
            value = critic.module(rollout["observation"])
            after = critic.module(rollout["next", "observation"])
        for i in range(4):
            advantage = 0.0
            for t in reversed(range(5)):
                end = rollout["next", "terminated"][i, t].item()
                done = rollout["next", "done"][i, t].item()
                error = rollout["next", "reward"][i, t] - value[i, t]
                error = error + (0 if end else GAMMA * after[i, t])
                advantage = error + (0 if done else GAMMA * 0.8 * advantage)
                close(rollout["value_target"][i, t], advantage + value[i, t])
        actor = make_actor(return_log_prob=True)
        loss = A2CLoss(actor, critic)
        out = loss(rollout)
        kept = rollout["collector", "mask"]
        alone = loss(rollout[kept].exclude("collector"))
        for key in ("loss_critic", "loss_objective"):
            close(out[key], alone[key], rtol=1e-5, atol=1e-6)


class TestExactModel:
    """Four rooms, its exact backward model, rewards known: targets are exact, and so is the end."""

    def transitions(self, num_traces=64):
        env = FourRoomsEnv(5)
        model = exact_backtrack_model(env, torch.full((25, 4), 0.25))
        trace = sample_traces(
            model,
            env.goal.expand(num_traces, 2),
            num_steps=40,
            generator=torch.Generator().manual_seed(2),
        )

        def at_goal(trace):
            return (trace["next", "observation"] == env.goal).all(-1)

        data = trace_transitions(
            trace, reward=lambda trace: at_goal(trace).float(), terminated=at_goal
        )
        return env, data

    def optimal(self, env):
        """Q*, ``[25, 4]``, by value iteration over the maze's own tables."""
        goal = int(env.goal[0]) * env.size + int(env.goal[1])
        q = torch.zeros(25, 4)
        for _ in range(50):
            into_goal = env.next_cell == goal
            q = torch.where(into_goal, 1.0, GAMMA * q.max(-1).values[env.next_cell])
            q[goal] = 0
        return q

    def agent(self, table):
        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(table.clone())

            def forward(self, cell):
                return self.table[cell[..., 0] * 5 + cell[..., 1]]

        actor = QValueActor(Table(), in_keys=["observation"], action_space="categorical")
        loss = DQNLoss(actor, action_space="categorical", delay_value=False)
        loss.make_value_estimator(gamma=GAMMA)
        return actor, loss

    def test_targets_are_exact(self):
        """At Q* the temporal difference of every kept step vanishes, and elsewhere it is not so."""
        env, data = self.transitions()
        kept = data["collector", "mask"]
        assert data["next", "reward"][kept].sum() == 64
        assert same(data["next", "terminated"], data["next", "reward"] > 0)
        _, loss = self.agent(self.optimal(env))
        assert loss(data)["loss"] < 1e-12
        _, wrong = self.agent(0.9 * self.optimal(env))
        assert wrong(data)["loss"] > 1e-4

    def test_a_critic_learns_exact_values(self):
        """By TorchRL's DQN loss; without traces the twelve real steps so far teach nothing."""
        env, data = self.transitions()
        best = self.optimal(env)
        kept = data["collector", "mask"]
        cell = data["observation"][kept] @ torch.tensor([5, 1])
        pair = (cell * 4 + data["action"][kept]).unique()
        assert len(pair) == 28
        real = FourRoomsEnv(5, seed=0, max_steps=None).rollout(12)
        assert real["next", "reward"].sum() == 0
        errors = []
        keys = ["observation", "action", "next"]
        data = data[kept]
        whole = torch.cat([data.select(*keys), real.select(*keys)])
        for batch in (whole, real):
            actor, loss = self.agent(torch.zeros(25, 4))
            optimizer = torch.optim.Adam(loss.parameters(), 0.1)
            for _ in range(200):
                optimizer.zero_grad()
                loss(batch)["loss"].backward()
                optimizer.step()
            table = actor.module[0].module.table.detach()
            errors.append((table - best).flatten()[pair].abs().max().item())
        assert errors[0] < 1e-3
        assert errors[1] > 0.4

    def test_weights_take_the_rewards(self):
        """`AdvantageWeight` finds them where `trace_transitions` puts them."""
        env = FourRoomsEnv(5)
        model = exact_backtrack_model(env, torch.full((25, 4), 0.25))
        trace = sample_traces(model, env.goal.expand(3, 2), num_steps=6)
        rollout = trace_transitions(
            trace,
            reward=lambda trace: (trace["next", "observation"] == env.goal).all(-1).float(),
            terminated=lambda trace: (trace["next", "observation"] == env.goal).all(-1),
            flatten=False,
        )
        critic = TensorDictModule(
            lambda s: s[..., :1] * torch.nan, ["observation"], ["state_value"]
        )
        kept = torch.ones(3, 6) > 0
        keys = ImitationKeys()
        # The critic knows nothing of the goal (NaN), and is not asked for the terminal state.
        returns = AdvantageWeight(critic, gamma=GAMMA).returns(rollout, rollout, kept, keys)
        close(returns, GAMMA ** torch.arange(5.0, -1, -1).expand(3, 6))


def test_a_learned_reward():
    """A module fitted to real rewards stands for the function; no part of its own is needed."""
    truth = torch.tensor([0.5, -1.0, 2.0])
    real = recall(1, 256, mask=False)["trace"].reshape(-1)
    real["next", "reward"] = (real["next", "observation"] @ truth + 0.3).unsqueeze(-1)
    learned = TensorDictModule(nn.Linear(WIDTH, 1), [("next", "observation")], [("next", "reward")])
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        guess = learned(real.select(("next", "observation")))["next", "reward"]
        loss = nn.functional.mse_loss(guess, real["next", "reward"])
        loss.backward()
        return loss

    optimizer.step(closure)
    trace = recall(4, 5)["trace"]
    data = trace_transitions(trace, reward=learned)
    expected = trace["next", "observation"].reshape(-1, WIDTH) @ truth + 0.3
    close(data["next", "reward"].squeeze(-1), expected, rtol=1e-3, atol=1e-3)
    assert not data["next", "reward"].requires_grad

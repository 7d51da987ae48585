"""Weights of imitation: against numbers by hand, loops as defined, self-imitation on real steps."""

from __future__ import annotations

import pytest
import torch
from loss_data import WIDTH, close, gradients, make_actor, recall, same
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives.value.functional import reward2go
from weight_data import GAMMA, WeightedContract, double, make_critic, weigh

from torchrl_recall import AdvantageWeight, RecallTraceLoss
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.imitation.weights import ImitationKeys, returns_along


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestAdvantageContract(WeightedContract):
    """With a discount and normalised weights, too."""

    def make(self, **kwargs):
        weight = AdvantageWeight(self.critic, gamma=GAMMA)
        options = {"discount": 0.8, "normalize_weights": True}
        return RecallTraceLoss(make_actor(), weight=weight, **options, **kwargs)


class TestReturns:
    def test_by_hand(self):
        got = returns_along(torch.tensor([10.0]), 3, 0.5)
        assert got.tolist() == [[1.25, 2.5, 5.0]]
        reward, end = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[False, True, False]])
        assert returns_along(torch.tensor([10.0]), 3, 0.5, reward).tolist() == [[4.0, 6.0, 8.0]]
        assert returns_along(torch.tensor([10.0]), 3, 0.5, reward, end).tolist() == [
            [2.0, 2.0, 8.0]
        ]
        assert returns_along(torch.tensor([10.0]), 3, 0.5, None, end).tolist() == [[0.0, 0.0, 5.0]]

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    def test_sums_of_discounted_rewards(self, gamma):
        reward, reached = torch.randn(4, 6).double(), torch.randn(4).double()
        got = returns_along(reached, 6, gamma, reward)
        for i in range(4):
            for t in range(6):
                total = sum(gamma ** (u - t) * reward[i, u] for u in range(t, 6))
                close(got[i, t], total + gamma ** (6 - t) * reached[i], rtol=1e-12, atol=1e-12)

    def test_what_follows_an_end_is_never_looked_at(self):
        end = torch.tensor([[False, True]])
        got = returns_along(torch.tensor([torch.nan]), 2, 0.5, torch.ones(1, 2), end)
        assert got.tolist() == [[1.5, 1.0]]


class TestAdvantageWeight:
    def test_by_hand(self):
        """V(s) = s_0; the trace leads to a state of value 1 in three steps of discount 0.5."""
        critic = TensorDictModule(lambda s: s[..., :1], ["observation"], ["state_value"])
        state = torch.tensor([[0.0, 9.0], [0.5, 9.0], [0.25, 9.0]])
        trace = TensorDict({"observation": state, "next": {"observation": state.roll(-1, 0)}}, [3])
        trace["next", "observation"][-1, 0] = 1.0
        data, kept = TensorDict({"trace": trace, "value": torch.tensor(1.0)}, []), torch.ones(3) > 0
        weight = AdvantageWeight(critic, gamma=0.5)
        for keys in (ImitationKeys(), ImitationKeys(value="value")):
            assert weight(trace, data, kept, keys).tolist() == [0.125, 0.0, 0.25]
        gate = AdvantageWeight(critic, gamma=0.5, gate=True)
        assert gate(trace, data, kept).tolist() == [1.0, 0.0, 1.0]
        # A value of the transition counts undiscounted at the step into the state.
        last = AdvantageWeight(critic, gamma=0.5, value_of="transition")
        assert last(trace, data, kept, ImitationKeys(value="value")).tolist() == [0.25, 0.0, 0.75]
        # A return that is just expected is no reason to imitate.
        trace["observation"][1, 0] = 0.25
        assert gate(trace, data, kept).tolist() == [1.0, 0.0, 1.0]

    @pytest.mark.parametrize("rewards", [False, True])
    @pytest.mark.parametrize("source", ["critic", "state", "transition"])
    @pytest.mark.parametrize("batch", [(4, 5), (3, 2, 5), (2, 3, 2, 5)])
    def test_definition_as_loops(self, batch, source, rewards):
        critic, data = make_critic(dtype=torch.float64), double(recall(*batch))
        rows = batch[:-2] if len(batch) > 2 else batch[:-1]
        if len(batch) > 2:
            data = TensorDict({"trace": data["trace"]}, rows)
        trace = data["trace"]
        if rewards:
            trace["next", "reward"] = torch.randn(*batch, 1).double()
            trace["next", "terminated"] = torch.rand(*batch, 1) < 0.3
        if source != "critic":
            data["worth"] = torch.randn(*rows, 1).double()
        weight = AdvantageWeight(
            critic, gamma=GAMMA, value_of="state" if source == "critic" else source
        )
        got = weigh(weight, data, **({} if source == "critic" else {"value": "worth"}))
        flat = trace.reshape(-1, batch[-1])
        worth = data["worth"] if source != "critic" else None
        for i in range(len(flat)):
            last = critic.module(flat["next", "observation"][i, -1]).item()
            if worth is not None:
                last = worth.flatten()[i * len(worth.flatten()) // len(flat)].item()
            for t in reversed(range(batch[-1])):
                if source != "transition" or t < batch[-1] - 1:
                    end = rewards and bool(flat["next", "terminated"][i, t])
                    last = 0.0 if end else GAMMA * last
                    last += flat["next", "reward"][i, t].item() if rewards else 0.0
                if not flat["collector", "mask"][i, t]:
                    continue
                value = critic.module(flat["observation"][i, t]).item()
                expected = torch.tensor(max(last - value, 0.0))
                close(got.reshape(-1, batch[-1])[i, t], expected, rtol=1e-6, atol=1e-6)

    def test_a_value_for_each_trace(self):
        critic, data = make_critic(), recall(3, 2, 5)
        data = TensorDict({"trace": data["trace"], "worth": torch.randn(3, 2)}, [3])
        weight = AdvantageWeight(critic, gamma=1.0)
        got = weigh(weight, data, value="worth")
        value = critic(data["trace"].select("observation"))["state_value"].squeeze(-1)
        kept = data["trace", "collector", "mask"]
        close(got[kept], (data["worth"].unsqueeze(-1) - value).clamp_min(0)[kept])

    def test_self_imitation_on_a_real_trajectory(self):
        """With a trace of real steps and their rewards the weight is SIL's max(R - V, 0)."""
        env = FourRoomsEnv(5, batch_size=(8,), max_steps=400, seed=1)
        steps = env.rollout(400, break_when_any_done=False)
        row = int(steps["next", "terminated"].any(1).squeeze(-1).nonzero()[0])
        length = int(steps["next", "terminated"][row].flatten().nonzero()[0]) + 1
        real = steps[row : row + 1, :length]
        assert real["next", "reward"].sum() == 1
        critic = ValueOperator(Cells(), in_keys=["observation"])
        returns = reward2go(real["next", "reward"], real["next", "done"], GAMMA)
        value = critic(real.select("observation"))["state_value"]
        expected = (returns - value).clamp_min(0).squeeze(-1)
        got = AdvantageWeight(critic, gamma=GAMMA)(real, real, torch.ones(1, length) > 0)
        close(got, expected, rtol=1e-6, atol=1e-6)
        assert 0 < (got > 0).sum() < length

    def test_masked_steps_between_are_steps(self):
        critic, data = make_critic(), recall(4, 5)
        got = weigh(AdvantageWeight(critic, gamma=GAMMA), data)
        kept = data["trace", "collector", "mask"].clone()
        data["trace", "collector", "mask"] |= True
        whole = weigh(AdvantageWeight(critic, gamma=GAMMA), data)
        close(got[kept], whole[kept])

    def test_junk_where_masked(self):
        class Strict(nn.Module):
            def forward(self, state):
                assert torch.isfinite(state).all(), "the critic saw what is masked"
                return state.sum(-1, keepdim=True)

        critic, data = ValueOperator(Strict(), in_keys=["observation"]), recall(4, 5)
        kept = data["trace", "collector", "mask"]
        kept[0], kept[1:, -1] = False, True
        actor = make_actor()
        loss = RecallTraceLoss(actor, weight=AdvantageWeight(critic, gamma=GAMMA))
        value = loss(data)["loss_imitation"]
        value.backward()
        expected = gradients(actor)
        actor.zero_grad()
        for key in ("observation", "action", ("next", "observation")):
            data["trace", key][~kept] = torch.nan
        other = loss(data)["loss_imitation"]
        other.backward()
        assert value == other
        assert value > 0
        assert all(same(a, b) for a, b in zip(gradients(actor), expected, strict=True))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_non_finite_values_are_refused(self, bad):
        critic, data = make_critic(), recall(4, 5, mask=False)
        data["worth"] = torch.ones(4)
        loss = RecallTraceLoss(make_actor(), weight=AdvantageWeight(critic, gamma=GAMMA))
        loss.set_keys(value="worth")
        data["worth"][2] = bad
        with pytest.raises(ValueError, match="returns along the trace at kept steps must be fin"):
            loss(data)
        data["trace", "collector", "mask"][2] = False
        loss(data)
        with torch.no_grad():
            critic.module[-1].bias.fill_(bad)
        with pytest.raises(ValueError, match="'state_value' at kept steps must be finite"):
            loss(data)

    def test_wrong_arguments(self):
        critic = make_critic()
        with pytest.raises(TypeError, match="critic must be a TensorDictModule, got Linear"):
            AdvantageWeight(nn.Linear(1, 1), gamma=GAMMA)
        with pytest.raises(ValueError, match="gamma must lie in"):
            AdvantageWeight(critic, gamma=1.5)
        with pytest.raises(ValueError, match=r"value_of must be .*, got 'goal'"):
            AdvantageWeight(critic, gamma=GAMMA, value_of="goal")
        with pytest.raises(TypeError, match="weight must be an ImitationWeight, got str"):
            RecallTraceLoss(make_actor(), weight="advantage")
        with pytest.raises(ValueError, match="discount must lie in"):
            RecallTraceLoss(make_actor(), discount=1.1)

    def test_wrong_data(self):
        data, weight = recall(4, 5), AdvantageWeight(make_critic(), gamma=GAMMA)
        with pytest.raises(KeyError, match="value key 'worth' is missing from the data"):
            weigh(weight, data, value="worth")
        data["worth"] = torch.ones(4, 3)
        with pytest.raises(ValueError, match=r"'worth' has shape \(4, 3\), expected one number"):
            weigh(weight, data, value="worth")
        with pytest.raises(KeyError, match="the network writes no 'v'"):
            weigh(weight, data, state_value="v")
        data["trace", "next", "reward"] = torch.ones(4, 5, 2)
        with pytest.raises(ValueError, match=r"trace \('next', 'reward'\) has shape \(4, 5, 2\)"):
            weigh(weight, data)
        del data["trace", "next"]
        with pytest.raises(KeyError, match=r"\('next', 'observation'\) is missing from the trace"):
            weigh(weight, data)
        wide = ValueOperator(nn.Linear(WIDTH, 2), in_keys=["observation"])
        with pytest.raises(ValueError, match=r"'state_value' has shape \(4, 5, 2\)"):
            weigh(AdvantageWeight(wide, gamma=GAMMA), recall(4, 5))


class Cells(nn.Module):
    """A value of cells that lies now above, now below the returns."""

    def forward(self, cell):
        return 0.9 ** (6 - cell.sum(-1, keepdim=True)).abs() - 0.45 * (cell[..., :1] % 2)

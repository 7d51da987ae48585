"""`fit`: its history, progress and options, and what it refuses."""

from __future__ import annotations

import builtins
import copy
import math

import pytest
import torch
from fit_data import assert_same, generator, quick, small_model
from model_data import make_maze, random_transitions
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    ReplayBuffer,
)

from torchrl_recall import BacktrackLoss, BacktrackModel, fit
from torchrl_recall.diagnostics import held_out_likelihood
from torchrl_recall.held_out import split_rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestHistory:
    def test_the_best_parameters_are_kept(self):
        """So few rows are learnt by heart: the held-out loss turns, and the best is before that."""
        data, model = random_transitions(60), BacktrackModel(3, 2, num_cells=(64,))
        history = quick(model, data, num_steps=150, learning_rate=1e-2, held_out=0.5)
        scores = history.held_out
        assert 0 < history.best_step < 150
        assert float(scores[-1]) > float(scores.min()) + 0.1
        training, kept_out = split_rows(torch.arange(60), 0.5, None, generator())
        found = held_out_likelihood(model, data[kept_out])
        assert float(found.total) == pytest.approx(float(scores.min()), rel=1e-5)
        assert int(history.step[scores.argmin()]) == history.best_step
        # The training loss is that of the steps since the evaluation before.
        assert math.isnan(float(history.training[0]))
        assert float(history.training[-1]) < float(history.training[1])
        assert len(training) == history.num_training == 30

    def test_patience_stops(self):
        data = random_transitions(60)
        options = {"num_steps": 1000, "learning_rate": 1e-2, "held_out": 0.5, "evaluate_every": 5}
        history = quick(BacktrackModel(3, 2, num_cells=(64,)), data, patience=4, **options)
        assert int(history.step[-1]) == history.best_step + 20 < 1000

    def test_without_held_out_rows_the_last_are_kept(self):
        history = quick(small_model(), random_transitions(40), held_out=0.0)
        assert history.best_step == 20
        assert bool(history.held_out.isnan().all())
        assert math.isnan(history.scalars()["held_out"])

    def test_evaluations(self):
        data = random_transitions(100)
        history = quick(small_model(), data, num_steps=17, evaluate_every=5)
        assert history.step.tolist() == [0, 5, 10, 15, 17]
        history = quick(small_model(), data, num_steps=None, num_epochs=2, batch_size=40)
        assert history.step[-1] == 6  # 90 rows are three batches of at most 40

    def test_an_epoch_sees_each_row_once(self, monkeypatch):
        data, seen = random_transitions(50), []
        data["observation"][:, 0] = torch.arange(50).float()
        forward = BacktrackLoss.forward

        def watch(self, tensordict):
            seen.extend(tensordict["observation"][:, 0].int().tolist())
            return forward(self, tensordict)

        monkeypatch.setattr(BacktrackLoss, "forward", watch)
        quick(small_model(), data, num_steps=None, num_epochs=3, held_out=0.0, batch_size=20)
        assert [sorted(seen[i : i + 50]) for i in (0, 50, 100)] == [list(range(50))] * 3
        assert seen[:50] != seen[50:100]

    def test_seeded(self):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(7)
            model = small_model()
            quick(model, random_transitions(60), generator=generator(seed))
            runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_a_fit_goes_on_from_where_the_model_is(self):
        data, model = random_transitions(60), small_model()
        first = quick(model, data, num_steps=100, held_out=0.2, learning_rate=1e-2)
        again = quick(model, data, num_steps=1, held_out=0.2, learning_rate=0.0)
        assert float(again.held_out[0]) == pytest.approx(float(first.held_out.min()), rel=1e-5)

    def test_schedule(self, monkeypatch):
        rates = []
        step = torch.optim.AdamW.step

        def watch(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", watch)
        options = {"num_steps": 4, "learning_rate": 0.1}
        quick(small_model(), random_transitions(40), schedule="cosine", **options)
        expected = [0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
        assert rates == pytest.approx(expected)
        rates.clear()
        quick(small_model(), random_transitions(40), **options)
        assert rates == [0.1] * 4


class TestProgress:
    def test_a_bar(self, capsys):
        quick(small_model(), random_transitions(40), progress=True)
        assert "held_out=" in capsys.readouterr().err

    def test_lines_without_tqdm(self, capsys, monkeypatch):
        original = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("tqdm"):
                raise ImportError(name)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        quick(small_model(), random_transitions(40), progress=True)
        out = capsys.readouterr().out
        assert "20 of 20 steps, training" in out

    def test_silence(self, capsys):
        quick(small_model(), random_transitions(40))
        captured = capsys.readouterr()
        assert captured.out + captured.err == ""


class TestLossOptions:
    def test_renamed_keys(self):
        data = random_transitions(60)
        renamed = TensorDict({"o": data["observation"]}, [60])
        renamed["agent", "a"], renamed["next", "o"] = data["action"], data["next", "observation"]
        models = [small_model()]
        models.append(copy.deepcopy(models[0]))
        quick(models[0], data)
        loss = BacktrackLoss(models[1])
        loss.set_keys(observation="o", action=("agent", "a"))
        quick(models[1], renamed, loss=loss)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_bootstrapped_ensemble(self):
        model = small_model(num_members=2)
        model.member(1).load_state_dict(model.member(0).state_dict())
        loss = BacktrackLoss(model, bootstrap=True, generator=generator(1))
        quick(model, random_transitions(60), loss=loss)
        one, other = (model.member(i).delta_network[0].weight for i in range(2))
        assert not torch.equal(one, other)


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_epochs": 2}, "give one of num_steps and num_epochs"),
            ({"num_steps": None}, "give one of num_steps and num_epochs"),
            ({"num_steps": 0}, "num_steps must be at least 1"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"learning_rate": -1.0}, "learning_rate must lie in"),
            ({"held_out": 1.0}, r"held_out must lie in \[0.0, 1.0\), got 1.0"),
            ({"held_out": 0.99}, "leaves 0 rows to fit"),
            ({"learning_rate": float("inf")}, r"learning_rate must lie in \[0.0, inf\), got inf"),
            ({"held_out": 1.5}, "held_out must lie in"),
            ({"patience": 0}, "patience must be at least 1"),
            ({"patience": 1, "held_out": 0.0}, "patience needs held_out rows"),
            ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
            (
                {"schedule": "linear"},
                r"schedule must be one of \('constant', 'cosine'\)",
            ),
            ({"max_grad_norm": -1.0}, "max_grad_norm must lie in"),
            ({"max_grad_norm": 0.0}, r"max_grad_norm must lie in \(0.0, inf\], got 0.0"),
        ],
    )
    def test_numbers(self, options, message):
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            quick(model, random_transitions(40), **options)
        assert_same(before, model.state_dict())

    def test_things(self):
        model, data = small_model(), random_transitions(40)
        with pytest.raises(TypeError, match="BacktrackModel, got Linear"):
            quick(torch.nn.Linear(1, 1), data)
        for buffer in ([1, 2], {"a": 1}, None):
            with pytest.raises(TypeError, match="buffer must be a TensorDict, or a Storage"):
                quick(model, buffer)
        other = BacktrackLoss(small_model())
        for loss in (other, BacktrackLoss(model, reduction="sum"), torch.nn.Linear(1, 1)):
            with pytest.raises(ValueError, match="loss must be a BacktrackLoss of this very model"):
                quick(model, data, loss=loss)

    def test_nothing_to_learn_from(self):
        model, data = small_model(), random_transitions(40)
        for empty in (
            ReplayBuffer(storage=LazyTensorStorage(10)),
            LazyTensorStorage(10),
            data[:0],
        ):
            with pytest.raises(ValueError, match="buffer is empty"):
                quick(model, empty)
        with pytest.raises(ValueError, match="leaves 0 rows to fit"):
            quick(model, data[:1])
        data["collector", "mask"] = torch.zeros(40, dtype=torch.bool)
        for share in (0.0, 0.1):
            with pytest.raises(ValueError, match=r"rows? .*(left )?to fit"):
                quick(model, data, held_out=share)
        with pytest.raises(KeyError, match=r"'action'.*missing"):
            quick(model, random_transitions(40).exclude("action"))

    def test_a_displacement_outside_the_support(self):
        env = make_maze(batch_size=(20,))
        data = env.rollout(20, break_when_any_done=False)
        data["observation"][3, 4] = torch.tensor([1, 3])
        data["next", "observation"][3, 4] = torch.tensor([3, 1])
        model = BacktrackModel.from_env(env, num_cells=(8,))
        with pytest.raises(ValueError, match=r"1 of .* transitions have a displacement"):
            quick(model, data, num_steps=None, num_epochs=1)

    def test_a_loss_that_explodes(self):
        model = small_model()
        with pytest.raises(RuntimeError, match=r"loss is .* lower learning_rate"):
            quick(model, random_transitions(40), learning_rate=1e30, evaluate_every=1)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_given_loss_keeps_its_mode():
    model = BacktrackModel(2, 1, num_cells=(8,))
    data = TensorDict(
        {
            "observation": torch.randn(50, 2),
            "action": torch.zeros(50, 1),
            "next": {"observation": torch.randn(50, 2)},
        },
        [50],
    )
    for training in (True, False):
        loss = BacktrackLoss(model).train(training)
        fit(model, data, num_epochs=1, loss=loss, progress=False)
        assert loss.training is training
        assert model.training is training


@pytest.mark.parametrize("seed", range(6))
def test_one_long_trajectory_is_not_held_out_for_a_short_share(seed):
    trajectory = torch.tensor([0] * 990 + [1] * 10)
    generator = torch.Generator().manual_seed(seed)
    training, kept_out = split_rows(torch.arange(1000), 0.1, trajectory, generator)
    assert (len(training), len(kept_out)) == (990, 10)

"""The numbers of losses, refresh and diagnostics in TorchRL's loggers, and read back from them."""

from __future__ import annotations

import csv
import importlib.util
import math

import pytest
import torch
from loss_data import make_actor, make_model, recall, transitions
from tensordict.nn import TensorDictModule
from torchrl.record.loggers import CSVLogger, TensorboardLogger, WandbLogger
from trainer_data import make_env, off_policy

from torchrl_recall import AdvantageWeight, BacktrackLoss, RecallTraceLoss
from torchrl_recall import diagnostics as d

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .* hook stage:FutureWarning"),
    # W&B's own, of its files and processes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(wandb|google|pydantic).*"),
]


class OfCSV:
    def __init__(self, folder):
        self.folder, self.logger = folder, CSVLogger("run", str(folder))

    def read(self):
        root = self.folder / "run" / "scalars"
        return {
            str(file.relative_to(root))[:-4]: [
                (int(step), float(value))
                for step, value in csv.reader(file.read_text().splitlines())
            ]
            for file in root.rglob("*.csv")
        }


class OfTensorBoard:
    def __init__(self, folder):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed; it is optional")
        self.folder, self.logger = folder, TensorboardLogger("run", str(folder))

    def read(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.logger.experiment.flush()
        events = EventAccumulator(str(self.folder / "run"))
        events.Reload()
        return {
            name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]
        }


class OfWeightsAndBiases:
    """Offline: nothing leaves the machine."""

    def __init__(self, folder):
        if importlib.util.find_spec("wandb") is None:
            pytest.skip("wandb is not installed; it is optional")
        self.logger = WandbLogger("run", offline=True, save_dir=str(folder), project="recall")
        self.rows, log = {}, self.logger.log_scalar

        def kept(name, value, step=None, **options):
            log(name, value, step=step, **options)
            # What the run holds, not what was handed over.
            self.rows.setdefault(name, []).append((step, float(self.run.summary[name])))

        self.logger.log_scalar = kept

    @property
    def run(self):
        return self.logger.experiment

    def read(self):
        return self.rows


LOGGERS = {"csv": OfCSV, "tensorboard": OfTensorBoard, "wandb": OfWeightsAndBiases}


@pytest.fixture(params=LOGGERS)
def sink(request, tmp_path):
    made = LOGGERS[request.param](tmp_path)
    yield made
    if request.param == "wandb":
        made.run.finish()
        assert len(list(tmp_path.rglob("*.wandb"))) == 1  # written to at leisure, by a process


def same_numbers(found, expected):
    assert set(expected) <= set(found)
    for name, rows in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in rows], name
        for (_, a), (_, b) in zip(found[name], rows, strict=True):
            assert a == pytest.approx(b, rel=1e-6, nan_ok=True), name


def test_what_losses_return(sink):
    """Every entry is one number, whatever the options."""
    torch.manual_seed(0)
    actor, model = make_actor(), make_model()
    critic = torch.nn.Linear(3, 1)
    weight = AdvantageWeight(TensorDictModule(critic, ["observation"], ["state_value"]), gamma=0.9)
    weighted = RecallTraceLoss(actor, weight=weight, discount=0.9)
    model_loss = BacktrackLoss(model, action_entropy_coeff=0.1)
    expected = {}
    for step in (3, 7):
        data = recall(8, 4)
        data["trace", "next", "reward"] = torch.ones(8, 4, 1)
        losses = weighted(data).update(model_loss(transitions(8)))
        for name, value in losses.items():
            sink.logger.log_scalar(name, value.item(), step=step)
            expected.setdefault(name, []).append((step, value.item()))
    names = {*weighted.out_keys, *model_loss.out_keys}
    assert set(expected) == names
    assert {"loss_imitation", "loss_backtrack", "trace_kept", "trace_open"} <= names
    assert all(math.isfinite(value) for rows in expected.values() for _, value in rows)
    same_numbers(sink.read(), expected)


def test_a_trainers_terms_and_staleness(sink):
    trainer, hook, _ = off_policy(make_env(), frames=96)
    trainer.logger, trainer._log_interval = sink.logger, 1
    hook.register(trainer)
    trainer.train()
    found = sink.read()
    names = ["loss_imitation", "loss_backtrack", "trace_kept", "trace_log_prob"]
    names += ["refresh/age_mean", "refresh/age_max", "refresh/share", "loss_qvalue"]
    for name in names:
        expected = [float(x) for x in trainer._log_dict[name]]
        assert len(expected) == 3
        values = [value for _, value in found[name]]
        assert values == pytest.approx(expected, rel=1e-6), name
        steps = [step for step, _ in found[name]]
        assert steps == sorted(set(steps)), name


def test_diagnostics(sink):
    torch.manual_seed(0)
    data, model = transitions(40), make_model()
    results = {
        "calibration": d.calibration(model, data),
        "likelihood": d.held_out_likelihood(model, data),
        "goals": d.goal_coverage(torch.tensor([[True, False], [True, True]])),
    }
    expected = {}
    for step in (1, 2):
        written = d.log_diagnostics(sink.logger, results, step=step, figures=False)
        for name, value in written.items():
            if math.isfinite(value):
                expected.setdefault(name, []).append((step, value))
    assert len(expected) > 5
    same_numbers(sink.read(), expected)

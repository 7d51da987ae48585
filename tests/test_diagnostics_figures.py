"""Pictures and logs: what is drawn is what was measured, and loggers get it."""

from __future__ import annotations

import csv
import importlib
import math
import pickle
import sys

import pytest
import torch
from model_data import random_transitions
from torchrl.record.loggers import CSVLogger

from torchrl_recall import BacktrackModel, fit, sample_traces
from torchrl_recall import diagnostics as d
from torchrl_recall.diagnostics import figures
from torchrl_recall.diagnostics.figures import PLOTS
from torchrl_recall.envs import FourRoomsEnv, exact_backtrack_model


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    env = FourRoomsEnv(5, slip=0.1, max_steps=None)
    policy = torch.full((25, 4), 0.25)
    maze_model = exact_backtrack_model(env, policy)
    with torch.no_grad():
        maze_model.action_network[2].weight += 0.1 * torch.randn(4, 100)
    model, data = BacktrackModel(3, 2, num_cells=(8,)), random_transitions(100)
    trace = sample_traces(model, data["next", "observation"], num_steps=6)
    return {
        "bound": d.maze_bound(maze_model, env, policy, num_traces=50),
        "divergence": d.maze_divergence(maze_model, env, policy),
        "likelihood": d.held_out_likelihood(model, data),
        "calibration": d.calibration(model, data),
        "compounding": d.compounding_error(trace, lambda s, a: s + a[..., :1], steps=(1, 3, 6)),
        "distance": d.distance_to_data(trace["observation"], data["observation"]),
        "visits": d.never_visited(torch.tensor([[0, 1], [1, 1]]), torch.tensor([1, 0])),
        "goals": d.goal_coverage(torch.tensor([[True, False], [True, True]])),
        "fit": fit(model, data, num_epochs=3, progress=False),
    }


def test_every_result_has_scalars_and_all_but_one_a_picture(results, tmp_path):
    for name, result in results.items():
        scalars = result.scalars()
        assert scalars
        assert all(isinstance(value, float) for value in scalars.values())
        again = pickle.loads(pickle.dumps(result))
        assert str(again.scalars()) == str(scalars)
        if name != "likelihood":
            figure = PLOTS[type(result)](result)
            axes = figure.axes[0]
            assert axes.get_xlabel() or axes.get_title()
            figure.savefig(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 2000


def test_curves_hold_the_numbers(results):
    axes = d.plot_compounding_error({"a": results["compounding"]}).axes[0]
    line = axes.containers[0].lines[0]
    assert line.get_xdata().tolist() == [1, 3, 6]
    assert line.get_ydata().tolist() == results["compounding"].mean.tolist()
    history = results["fit"]
    lines = {line.get_label(): line for line in d.plot_fit(history).axes[0].lines}
    assert lines["held out"].get_ydata().tolist() == history.held_out.tolist()
    assert lines["kept"].get_xdata() == [history.best_step] * 2
    distance = results["distance"]
    (line,) = d.plot_distance(distance).axes[0].lines
    assert list(line.get_xdata()) == [6, 5, 4, 3, 2, 1]
    assert line.get_ydata().tolist() == distance.outside_by_step.tolist()
    image = d.plot_divergence(results["divergence"]).axes[0].images[0].get_array()
    found = results["divergence"]
    assert float(image.sum()) == pytest.approx(float(found.trajectory))
    pit = results["calibration"]
    lines = d.plot_calibration(pit, ["x", "y", "z"]).axes[0].lines
    assert [line.get_label()[0] for line in lines[1:]] == ["x", "y", "z"]
    for i, line in enumerate(lines[1:]):
        assert line.get_ydata()[50] == pytest.approx(float((pit.pit[:, i] <= 0.5).double().mean()))
    with pytest.raises(ValueError, match="names has 1 entries, expected 3"):
        d.plot_calibration(pit, ["x"])


def test_curves_differ_without_colour(results):
    several = {str(i): results["compounding"] for i in range(6)}
    containers = d.plot_compounding_error(several).axes[0].containers
    styles = {(c.lines[0].get_linestyle(), c.lines[0].get_marker()) for c in containers}
    assert len(styles) == 6


def test_pyplot_is_left_alone(results, monkeypatch):
    """No global state, and no matplotlib where nothing is drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it now fails
    d.plot_goal_coverage(results["goals"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        d.plot_goal_coverage(results["goals"])
    monkeypatch.delitem(sys.modules, figures.__name__)
    importlib.import_module(figures.__name__)


def read(folder):
    return {
        str(file.relative_to(folder / "run" / "scalars"))[:-4]: list(
            csv.reader(file.read_text().splitlines())
        )
        for file in (folder / "run" / "scalars").rglob("*.csv")
    }


def test_scalars_go_to_the_csv_logger(results, tmp_path):
    logger = CSVLogger("run", str(tmp_path))
    written = d.log_diagnostics(logger, results, step=7)
    expected = {f"{n}/{s}": v for n, r in results.items() for s, v in r.scalars().items()}
    assert str(written) == str(expected)
    finite = {name: value for name, value in expected.items() if math.isfinite(value)}
    assert len(finite) > 25
    files = read(tmp_path)
    assert set(files) == set(finite)
    for name, value in finite.items():
        ((step, text),) = files[name]
        assert (int(step), float(text)) == (7, value)
    d.log_diagnostics(logger, {"goals": results["goals"]}, step=8)
    assert [row[0] for row in read(tmp_path)["goals/share"]] == ["7", "8"]


class Recorder:
    """A logger that takes pictures, as TensorBoard's."""

    def __init__(self):
        self.experiment, self.scalars, self.figures = self, {}, {}

    def log_scalar(self, name, value, step=None):
        self.scalars[name] = value

    def add_figure(self, name, figure, global_step=None):
        self.figures[name] = (type(figure).__name__, global_step)


def test_pictures_go_where_they_are_taken(results):
    logger = Recorder()
    d.log_diagnostics(logger, results, step=3)
    assert logger.figures == {name: ("Figure", 3) for name in results if name != "likelihood"}
    logger = Recorder()
    d.log_diagnostics(logger, results, step=3, figures=False)
    assert logger.figures == {}
    assert logger.scalars


def test_pictures_go_to_tensorboard(results, tmp_path):
    pytest.importorskip("tensorboard")
    from torchrl.record.loggers import TensorboardLogger

    logger = TensorboardLogger("run", str(tmp_path))
    d.log_diagnostics(logger, {"goals": results["goals"]}, step=3)
    logger.experiment.flush()
    (file,) = (f for f in tmp_path.rglob("*") if f.is_file())
    text = file.read_bytes()
    assert b"goals/share" in text
    assert b"PNG" in text


def test_wrong_arguments(results):
    with pytest.raises(TypeError, match="log_scalar, got dict"):
        d.log_diagnostics({}, results)
    with pytest.raises(TypeError, match=r"results\['x'\] must be a result"):
        d.log_diagnostics(Recorder(), {"x": 1.0})

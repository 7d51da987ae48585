"""How far traces are from what their actions really do: single Gaussian, mixture and ensemble.

`python -m bench.compounding_error run --minutes 60` fits what is missing, one file a run under
``bench/results/compounding_error/``; `python -m bench.compounding_error report` prints the table
and draws the figure from these files alone.

Each task has one data set of a random policy. Each seed fits the three models to it with the same
settings, walks 20 steps back from 100 real states that were held out, and replays the actions in
the real environment, set to the state k steps before the end of the trace. Errors are in standard
deviations of the state, root mean square over dimensions: two states that have nothing to do with
each other are 1.41 apart. Two controls without a model put real trajectories in the place of
traces: as they are (the floor), and begun .05 standard deviations off, which shows by how much the
environment itself makes errors grow. A run's error is that of its median trace: the mean, which the
report has in brackets, follows a few replays in which the simulation explodes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from bench.machine import RESULTS, describe
from bench.result_files import write_result
from torchrl_recall import BacktrackModel, fit, sample_traces
from torchrl_recall.demo.report import half_width
from torchrl_recall.diagnostics import (
    calibration,
    compounding_error,
    distance_to_data,
    held_out_likelihood,
    mujoco_step,
)
from torchrl_recall.envs import PointMazeEnv

FOLDER = RESULTS / "compounding_error"
FIGURE = RESULTS / "compounding_error.png"
STEPS = (1, 5, 10, 20)
STARTS, LENGTH = 100, 20
NUM_STEPS, NUM_CELLS = 1500, (128, 128)
MODELS: dict[str, dict[str, Any]] = {
    "single": {},
    "mixture": {"num_components": 5},
    "ensemble": {"num_members": 5},
}
# Rows of the table: a fitted ensemble walks in two ways.
ROWS = {
    "single": "single Gaussian",
    "mixture": "mixture of 5",
    "ensemble": "ensemble of 5, member for each step",
    "ensemble_trace": "ensemble of 5, member for each trace",
}
# How far off the real trajectories begin, in standard deviations of the state.
CONTROLS = {"real": 0.0, "perturbed": 0.05}
ROWS |= {"real": "control: real", "perturbed": "control: real, begun .05 off"}
COLUMNS = {"nll": "held-out NLL", "ks": "KS of Δ", "outside": "outside the data"}


class Task(NamedTuple):
    """Real transitions, a way to step the environment, and what only it can tell."""

    training: TensorDict
    held_out: TensorDict
    step: Callable[[Tensor, Tensor], Tensor]
    free: Callable[[Tensor], Tensor] | None


def maze(dynamics: str) -> Task:
    """A point in a U-shaped maze, from anywhere, uniform actions; walls stop it."""

    def collect(seed: int, rows: int) -> TensorDict:
        torch.manual_seed(seed)
        options: Any = {"dynamics": dynamics, "start": "any", "max_steps": None}
        env = PointMazeEnv("u", batch_size=(rows // 50,), seed=seed, **options)
        data: Any = env.rollout(50, break_when_any_done=False)
        data["collector", "traj_ids"] = torch.arange(rows // 50).unsqueeze(-1).expand(data.shape)
        return data.reshape(-1)

    env = PointMazeEnv("u", dynamics=dynamics)  # pyright: ignore[reportArgumentType]
    return Task(collect(0, 10_000), collect(1, 5_000), env.step_states, env.free)


def cheetah() -> Task:
    """HalfCheetah whose whole state is observed, actions of an autoregressive random policy."""
    env = gymnasium.make("HalfCheetah-v5", exclude_current_positions_from_observation=False)

    def collect(seed: int, episodes: int) -> TensorDict:
        random = np.random.default_rng(seed)
        rows, actions, nexts, numbers = [], [], [], []
        for episode in range(episodes):
            state, _ = env.reset(seed=1000 * seed + episode)
            action = np.zeros(6)
            for _ in range(200):
                action = np.clip(0.8 * action + 0.4 * random.standard_normal(6), -1, 1)
                after = env.step(action.astype(np.float32))[0]
                rows.append(state)
                actions.append(action)
                nexts.append(after)
                numbers.append(episode)
                state = after
        tensor = {
            k: torch.as_tensor(np.stack(v)).float() for k, v in {"o": rows, "n": nexts}.items()
        }
        data = {"observation": tensor["o"], "next": {"observation": tensor["n"]}}
        data["action"] = torch.as_tensor(np.stack(actions)).float()
        data["collector"] = {"traj_ids": torch.tensor(numbers)}
        return TensorDict(data, [len(rows)])

    return Task(collect(0, 100), collect(1, 25), mujoco_step(env), None)


TASKS: dict[str, Callable[[], Task]] = {
    "maze": lambda: maze("position"),
    "maze_velocity": lambda: maze("velocity"),
    "half_cheetah": cheetah,
}


def run(task_name: str, task: Task, name: str, seed: int) -> list[dict[str, Any]]:
    """Fit one model with one seed, and measure it; an ensemble gives two results."""
    torch.manual_seed(seed)
    size, width = (task.training[key].shape[-1] for key in ("observation", "action"))
    model = BacktrackModel(size, width, num_cells=NUM_CELLS, **MODELS[name])
    started = time.process_time()
    history = fit(
        model,
        task.training,
        num_steps=NUM_STEPS,
        learning_rate=2e-3,
        schedule="cosine",
        evaluate_every=250,
        progress=False,
        generator=torch.Generator().manual_seed(seed),
    )
    seconds = time.process_time() - started
    likelihood = held_out_likelihood(model, task.held_out)
    pit = calibration(model, task.held_out)
    result = {
        "task": task_name,
        "seed": seed,
        "fit_seconds": round(seconds, 1),
        "best_step": history.best_step,
        "nll": float(likelihood.total),
        "nll_action": float(likelihood.action),
        "nll_delta": float(likelihood.delta),
        "ks": float(pit.distance.max()),
        "coverage_90": pit.scalars()["coverage_90"],
    }
    results = [{"model": name, **result, **walks(task, model, seed)}]
    if name == "ensemble":
        model.member_per = "trace"
        results.append({"model": "ensemble_trace", **result, **walks(task, model, seed)})
    return results


def walks(task: Task, model: BacktrackModel, seed: int) -> dict[str, Any]:
    """Walk from held-out states, and see where the actions lead and where the states lie."""
    generator = torch.Generator().manual_seed(100 + seed)
    rows = torch.randperm(len(task.held_out), generator=generator)[:STARTS]
    start = task.held_out["next", "observation"][rows]
    trace = sample_traces(model, start, num_steps=LENGTH, generator=generator)
    return measured(task, trace, generator)


def measured(task: Task, trace: Any, generator: torch.Generator) -> dict[str, Any]:
    """Return where the actions of traces lead, and where their states lie."""
    reference = task.training["observation"]
    scale = reference.std(0)
    found = compounding_error(trace, task.step, scale, steps=STEPS)
    subset = torch.randperm(len(reference), generator=generator)[:2000]
    distance = distance_to_data(trace["observation"], reference[subset], scale=scale)
    result: dict[str, Any] = {
        "mean": found.mean.tolist(),
        "median": found.median.tolist(),
        "path": found.path.tolist(),
        "lost": int(found.error.isinf().sum()),
        "outside": float(distance.outside),
        "outside_by_step": distance.outside_by_step.tolist(),
    }
    if task.free is not None:
        result["in_walls"] = float((~task.free(trace["observation"])).float().mean())
    return result


def control(task_name: str, task: Task, name: str, seed: int) -> list[dict[str, Any]]:
    """Replay real trajectories that were not fitted, from where they began or a little off."""
    generator = torch.Generator().manual_seed(100 + seed)
    data, scale = task.held_out, task.training["observation"].std(0)
    # Rows that lead into the next one, twenty in a row.
    leads = (data["next", "observation"][:-1] == data["observation"][1:]).all(-1)
    whole = leads.unfold(0, LENGTH - 1, 1).all(-1).nonzero().squeeze(-1)
    first = whole[torch.randperm(len(whole), generator=generator)[:STARTS]]
    trace: Any = data[first.unsqueeze(-1) + torch.arange(LENGTH)]
    noise = torch.randn(trace["observation"].shape, generator=generator)
    trace["observation"] += CONTROLS[name] * scale * noise
    result = {"model": name, "task": task_name, "seed": seed}
    return [{**result, **measured(task, trace, generator)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    if arguments.what == "report":
        report()
        return
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine, end = describe(), time.monotonic() + 60 * arguments.minutes
    tasks: dict[str, Task] = {}
    for seed in range(arguments.seeds):
        for task_name in arguments.tasks:
            for name in (*CONTROLS, *MODELS):
                if (FOLDER / f"{task_name}_{name}_{seed}.json").exists():
                    continue
                if time.monotonic() > end:
                    return
                if task_name not in tasks:
                    tasks[task_name] = TASKS[task_name]()
                # The single file of a run is written last: what has it need not be run again.
                measure = control if name in CONTROLS else run
                for result in reversed(measure(task_name, tasks[task_name], name, seed)):
                    file = FOLDER / f"{task_name}_{result['model']}_{seed}.json"
                    write_result(file, {**result, "machine": machine}, indent=None)
                    print(task_name, result["model"], seed, result["median"], flush=True)


def load() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Read all results, by task and row."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault((result["task"], result["model"]), []).append(result)
    return found


def interval(values: list[float], digits: int = 2) -> str:
    """Mean over seeds with its 95 % t-interval."""
    array = np.array(values, dtype=float)
    return f"{array.mean():.{digits}f} ± {float(half_width(array)):.{digits}f}"


def report() -> None:
    """Print the tables and draw the figure."""
    found = load()
    tasks = [name for name in TASKS if any(task == name for task, _ in found)]
    for task in tasks:
        for line in table(task, {row: found[task, row] for row in ROWS if (task, row) in found}):
            print(line)
    draw(found, tasks)


def table(task: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of a task's table: errors, the median trace (the mean of traces), and diagnostics."""
    seeds = {len(results) for results in found.values()}
    columns = dict(COLUMNS)
    if any("in_walls" in r for results in found.values() for r in results):
        columns["in_walls"] = "in walls"
    heads = [f"{k} steps" for k in STEPS] + [f"step {LENGTH} alone", *columns.values()]
    lines = ["", f"{task}, {min(seeds)} to {max(seeds)} seeds", ""]
    lines += ["| model | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row, results in found.items():
        cells = []
        for i in range(len(STEPS)):
            mean = np.mean([r["mean"][i] for r in results])
            cells.append(f"{interval([r['median'][i] for r in results], 3)} ({mean:.2f})")
        # One real step from the oldest state: what friction has forgotten by the end of a replay.
        cells.append(interval([r["path"][0] for r in results]))
        for column in columns:
            known = all(column in r for r in results)
            cells.append(interval([r[column] for r in results]) if known else "")
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return lines


def draw(found: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str]) -> None:
    """One panel a task: error of the median trace against the number of steps replayed."""
    from matplotlib.figure import Figure

    from torchrl_recall.diagnostics.figures import STYLES

    figure = Figure(figsize=(3.6 * len(tasks) + 0.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for (row, label), style in zip(ROWS.items(), STYLES, strict=False):
            results = found.get((task, row))
            if not results:
                continue
            error = np.array([r["median"] for r in results])
            color, dashes, marker = style
            options: Any = {"linestyle": dashes, "marker": marker, "capsize": 3, "color": color}
            axes.errorbar(STEPS, error.mean(0), half_width(error), label=label, **options)
        axes.set_title(task)
        axes.set_xlabel("steps replayed")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("error at the end, std of the state")
    shown = panels[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()

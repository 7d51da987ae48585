"""The rows of the ablation table: what each changes of the main job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.learning.variants import NUM_MEMBERS, Options
from torchrl_recall.demo.train import Settings

SIZE = 15
BUDGET = 60_000  # environment steps; an unsolved run counts as all of them
SEEDS = tuple(range(500, 510))

GROUPS = (
    "Goal known beforehand",
    "Which steps to imitate",
    "The model",
    "What the model learns from",
    "Freshness of traces",
    "How much",
    "Weights by the critic",
    "Random starts, goal known",
    "Goal found by reward",
)


@dataclass(frozen=True)
class Row:
    """One row: the main job but for ``settings`` and ``options``."""

    name: str
    label: str
    group: str
    options: Options = field(default_factory=Options)
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = "recall_known"
    reference: str = "default"
    """The row that ratios are taken to."""

    def make_settings(self, size: int, budget: int) -> Settings:
        """Return the settings of a run."""
        return Settings(size=size, steps=budget, **self.settings)

    def definition(self, size: int, budget: int) -> dict[str, Any]:
        """Return all that says what is run, for the results to carry."""
        settings = asdict(self.make_settings(size, budget))
        settings["num_cells"] = list(settings["num_cells"])
        return {"method": self.method, "settings": settings, "options": asdict(self.options)}


def _rows() -> list[Row]:
    known, steps, model, data, fresh, amount, weights, anywhere, found = GROUPS
    rows = [
        Row("default", "default: last visit, fresh traces, all data", known),
        Row("every_visit", "every visit", steps, Options(last_visit=False)),
        Row(
            "rising_value",
            "rising value of the critic instead of last visit",
            steps,
            Options(last_visit=False, mask="rising_value"),
        ),
        Row("exact", "exact backward model, last visit", model, Options(model="exact")),
        Row(
            "exact_every_visit",
            "exact backward model, every visit",
            model,
            Options(model="exact", last_visit=False),
        ),
    ]
    rows += [
        Row(
            f"new_every_{n}",
            f"new traces every {n} iterations",
            fresh,
            Options(trace_every=n),
        )
        for n in (2, 8, 32)
    ]
    rows += [Row("best_data", "model on the best 64 episodes only", data, Options(data="best"))]
    for name, label, values in (
        ("imitation_updates", "imitation steps an iteration: {}", (1, 4, 16)),
        ("imitation_coeff", "imitation weight {}", (0.1, 2.0)),
        ("trace_length", "traces of {} n steps", (1, 2)),
        ("num_traces", "{} traces an imitation step", (4, 64)),
    ):
        rows += [
            Row(f"{name}_{value:g}", label.format(f"{value:g}"), amount, settings={name: value})
            for value in values
        ]
    for last_visit, visit in ((True, "last visit"), (False, "every visit")):
        end = "" if last_visit else "_every_visit"
        advantage = Options(weight="advantage", last_visit=last_visit)
        gate = Options(weight="gate", last_visit=last_visit)
        rows += [
            Row(f"advantage{end}", f"advantage weights, {visit}", weights, advantage),
            Row(f"gate{end}", f"gate by the critic, {visit}", weights, gate),
        ]
    rows += [
        Row("ensemble", "ensemble of 5", model, Options(num_members=NUM_MEMBERS)),
        Row(
            "disagreement",
            "ensemble of 5, cut where its members disagree",
            model,
            Options(num_members=NUM_MEMBERS, mask="disagreement"),
        ),
        Row("stop", "stop head", model, Options(stop=True)),
        Row("uniform", "uniform reverse actions", model, Options(reverse_action="uniform")),
        Row(
            "entropy",
            "entropy of reverse actions, weight 0.1",
            model,
            Options(action_entropy_coeff=0.1),
        ),
        Row("growing", "traces grow from 1 n to 4 n", amount, Options(growing=True)),
    ]
    for name, label, options in (
        ("default", "default", Options()),
        ("every_visit", "every visit", Options(last_visit=False)),
        (
            "rising_value",
            "rising value of the critic instead of last visit",
            Options(last_visit=False, mask="rising_value"),
        ),
        ("new_every_8", "new traces every 8 iterations", Options(trace_every=8)),
        ("best_data", "model on the best 64 episodes only", Options(data="best")),
    ):
        rows.append(
            Row(
                f"found_{name}",
                label,
                found,
                options,
                method="recall_found",
                reference="found_default",
            )
        )
    for name, label, options in (
        ("default", "default", Options()),
        ("every_visit", "every visit", Options(last_visit=False)),
        ("best_data", "model on the best 64 episodes only", Options(data="best")),
    ):
        rows.append(
            Row(
                f"anywhere_{name}",
                label,
                anywhere,
                options,
                {"start": "any"},
                reference="anywhere_default",
            )
        )
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


ROWS = {row.name: row for row in _rows()}

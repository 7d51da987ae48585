"""The benchmark is fair, and says what it measured: peers walk the same model as the library."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from bench import floor, peers
from bench.agreement import assert_standard_normal, reference
from bench.cases import SIZES, Size, build
from bench.machine import describe, result_file
from bench.our_samplers import IN_TORCH, MODES, our_samplers
from bench.ours import variants
from bench.peers import Unavailable, loop, mbrl_env, trees, walker, walks
from bench.peers.plain import plain_step, walk
from bench.report import main, table
from bench.turns import Turns, quartiles

ROOT = Path(__file__).parents[1]
CASES = ["S", "four rooms"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_rollout_walks_the_same_model(name):
    model, start = build(name)
    peer, again = (walker(model, start, SIZES[name].num_steps)() for _ in range(2))
    assert not torch.equal(peer["action"], again["action"]), "the rollout must sample"
    after, before = peer["observation"], peer["next", "observation"]
    assert torch.equal(after[:, 0], start)
    assert torch.equal(after[:, 1:], before[:, :-1])
    expected = model.step_log_prob(before, peer["action"], after)
    torch.testing.assert_close(peer["action_log_prob"], expected["action"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        peer["next", "delta_log_prob"], expected["delta"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_loop_walks_as_the_rollout_does(name):
    model, start = build(name)
    num_steps = SIZES[name].num_steps
    torch.manual_seed(1)
    rollout = walker(model, start, num_steps)()
    torch.manual_seed(1)
    out = loop.walker(model, start, num_steps)()
    assert torch.equal(out["observation"], rollout["next", "observation"])
    assert torch.equal(out["action"], rollout["action"])
    assert torch.equal(out["action_log_prob"], rollout["action_log_prob"])
    assert torch.equal(out["delta_log_prob"], rollout["next", "delta_log_prob"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_plain_step_gives_the_references_numbers(name):
    model, start = build(name)
    noise, expected = reference(model, start, SIZES[name].num_steps)
    out = walk(plain_step(model), start, zip(*noise[:3], strict=True))
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted.transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_jax_walks_the_same_model():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    # In a process of its own: after JAX has started its threads, none may fork.
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_jax_numbers.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout
    assert "4 passed" in out.stdout


@torch.no_grad()
def test_mbrl_draws_normal_noise_each_call():
    pytest.importorskip("mbrl")
    model, start = build("S")
    run = mbrl_env.walker(model, start, SIZES["S"].num_steps)
    assert "hydra" not in sys.modules or hasattr(sys.modules["hydra"], "main")
    out, again = run(), run()
    assert not torch.equal(out.observation, again.observation)
    assert_standard_normal(model, start, out.observation, out.action)
    after = torch.cat([start.unsqueeze(1), out.observation[:, :-1]], 1)
    log_prob = model.step_log_prob(out.observation, out.action, after)["action"]
    torch.testing.assert_close(out.action_log_prob, log_prob, rtol=1e-3, atol=1e-3)


def test_peers_that_cannot_run_are_left_out_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setitem(sys.modules, "mbrl.models", None)
    model, start = build("S")
    built, skipped = walks([*list(peers.PEERS)[:4], "CUDA graph"], model, start, 2)
    assert list(built) == ["TorchRL rollout", "TensorDictModule loop"]
    assert list(skipped) == ["mbrl-lib ModelEnv", "JAX jit(scan)", "CUDA graph"]
    assert skipped["JAX jit(scan)"].startswith("JAX is not installed")
    assert skipped["mbrl-lib ModelEnv"].startswith("mbrl-lib is not installed")
    assert skipped["CUDA graph"] == "needs a CUDA device"


def test_mbrl_is_for_continuous_states():
    with pytest.raises(Unavailable, match="continuous"):
        mbrl_env.walker(*build("four rooms"), 2)


DRAWN = 64
BY_VALUE = {"mode per", "mode per, in torch", *trees.SAMPLERS}


def contenders_of_the_sampler():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 TorchRL's sampler draws from this one
    storage = LazyTensorStorage(DRAWN)
    storage.set(torch.arange(DRAWN), TensorDict({"row": torch.zeros(DRAWN)}, [DRAWN]))
    values = torch.rand(DRAWN)
    (own, refused), (others, absent) = (
        our_samplers(values, storage),
        trees.samplers(values, storage),
    )
    return own | others, refused | absent


@pytest.mark.parametrize("name", sorted(BY_VALUE))
def test_the_samplers_draw_by_value_after_refresh_and_update(name):
    built, skipped = contenders_of_the_sampler()
    if name in skipped:
        pytest.skip(skipped[name])
    sampler = built[name]
    values = torch.rand(DRAWN)
    sampler.refresh(values)
    index, some = torch.tensor([3, 60, 17]), torch.tensor([3.0, 0.5, 2.0])
    values[index] = some
    sampler.update(index, some)
    # cpprb hands out the same memory each time.
    drawn = torch.cat([sampler.draw(256).clone() for _ in range(100)])
    assert drawn.dtype == torch.int64
    expected = values.double() / values.sum() * drawn.numel()
    # cpprb takes a number of each part of the sum, hence comes closer than chance would; its seed
    # cannot be set.
    statistic = ((drawn.bincount(minlength=DRAWN) - expected) ** 2 / expected).sum().item()
    assert scipy.stats.chi2.sf(statistic, DRAWN - 1) > 1e-4


def test_all_samplers_are_there_or_left_out_by_name(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no trees\nhere")

    monkeypatch.setitem(sys.modules, "cpprb", None)
    monkeypatch.setattr(trees, "PrioritizedSampler", broken)
    built, skipped = contenders_of_the_sampler()
    assert set(built) | set(skipped) == {*MODES, *IN_TORCH, *trees.SAMPLERS}
    assert next(iter(built)) == "mode per"
    assert skipped["cpprb"].startswith("cpprb is not installed")
    assert skipped["TorchRL PrioritizedSampler"] == "its extension does not load: no trees"


def test_our_own_options_that_the_library_refuses_are_left_out_by_name():
    model, start = build("S")
    wanted = {"plain": {}, "odd": {"backend": "none"}}
    built, skipped = variants(wanted, model, start, 2)
    assert list(built) == ["plain"]
    assert built["plain"]().shape == (64, 2)
    assert "none" in skipped["odd"]


def test_the_floor_counts_products_and_numbers():
    size = Size(rows=2, num_steps=3, observation=5, action=1, width=4, rounds=1)
    # 5-4-4-2 and 6-4-4-10 multiply-adds a step.
    assert floor.products(size) == 2 * 6 * ((20 + 16 + 8) + (24 + 16 + 40))
    assert floor.random_numbers(size) == 36
    assert floor.seconds(size, floor.Core(1488.0, 0.5, "hand")) == 1 + 18


def test_the_floor_is_measured_on_normal_numbers():
    out = floor.run_c()
    if out is None:
        pytest.skip("no C compiler")
    assert out["peak"] > 1e8
    assert 0 < out["random"] < 1e-6
    # 102,400 numbers, to 5 errors.
    assert abs(out["mean"]) < 5 * 102_400**-0.5
    assert abs(out["variance"] - 1) < 5 * (2 / 102_400) ** 0.5


def test_the_floor_without_a_compiler(monkeypatch):
    monkeypatch.setattr(floor.shutil, "which", lambda name: None)
    core = floor.measure()
    assert core.source == "torch"
    assert core.flops > 1e8
    assert 0 < core.random_seconds < 1e-5


def test_ratios_are_medians_over_rounds_that_start_with_another_each_time(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("bench.turns.time.perf_counter", lambda: clock[0])

    def lasts(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    contenders = {"ours": lasts("o", 1.0), "peer": lasts("p", 3.0)}
    turns = Turns(contenders, lambda: None, warmup=1)
    for factor in (1, 1, 4):
        contenders["peer"] = turns.contenders["peer"] = lasts("p", 3.0 * factor)
        turns.round()
    record = turns.record()
    assert "".join(order) == "op" + "op" + "po" + "op"
    assert record == {
        "rounds": 3,
        "milliseconds": {"ours": 1e3, "peer": 3e3},
        "fastest": {"ours": 1e3, "peer": 3e3},
        "ratios": {"ours": 1.0, "peer": 3.0},
        "intervals": {"ours": [1.0, 1.0], "peer": [3.0, 7.5]},
    }


def test_quick_contenders_are_called_several_times_a_turn(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bench.turns.time.perf_counter", lambda: clock[0])

    def quick():
        clock[0] += 0.004

    turns = Turns({"ours": quick}, lambda: None, warmup=1)
    turns.round()
    assert turns.calls == {"ours": 5}
    assert turns.record()["milliseconds"]["ours"] == pytest.approx(4)


def test_quartiles():
    assert quartiles([2.0]) == [2.0, 2.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def test_the_machine_names_its_result_file():
    machine = describe()
    assert result_file(machine).name.endswith("-cpu.json")
    machine["device"] = "NVIDIA H100 80GB HBM3"
    assert result_file(machine).name == "nvidia-h100-80gb-hbm3.json"


def hand_made():
    """Return a result file as it is saved."""
    machine = {
        "processor": "Abacus",
        "count": 2,
        "device": "cpu",
        "threads": 1,
        "torch": "2",
        "torchrl": "0.14",
        "python": "3.11",
        "peers": {"jax": "0.10"},
    }
    small = {
        "case": "traces, S",
        "ratios": {"sample_traces": 1.0, "TorchRL rollout": 88.96, "JAX jit(scan)": 3.5},
        "intervals": {"TorchRL rollout": [87.0, 91.2], "JAX jit(scan)": [3.4, 3.6]},
        "skipped": {"CUDA graph": "needs a CUDA device"},
        "floor": {"milliseconds": 1.0, "ours": 1.25},
    }
    rooms = {
        "case": "traces, four rooms",
        "ratios": {"sample_traces": 1.0, "TorchRL rollout": 150.0},
        "skipped": {"CUDA graph": "needs a CUDA device"},
    }
    scaling = [
        {
            "case": f"scaling, {axis} {value}",
            "ratios": {"sample_traces": 1.0, "TorchRL rollout": 2.0, "JAX jit(scan)": 0.9},
            "axis": axis,
            "value": value,
        }
        for axis in "BTDh"
        for value in (4, 16)
    ]
    buffer = {
        "case": "buffer, sample",
        "ratios": {"sample_traces alone": 1.0, "with traces": 1.05},
        "bar": {"with traces": 1.15},
    }
    sampler = {
        "case": "sampler of 1e6, update 256, draw 256",
        "ratios": {"mode per": 1.0, "cpprb": 7.25},
        "intervals": {"cpprb": [7.0, 7.5]},
    }
    sizes = {"case": "sampler sizes, refresh (per)", "ratios": {"1e6": 1.0, "1e7": 10.0}}
    through_buffer = {
        "case": "buffer of 1e6, sample(256)",
        "ratios": {"mode per": 1.0, "cpprb": 2.5},
        "at_least": {"cpprb": 0.95},
    }
    drawn = [sampler, sizes, through_buffer]
    return {
        "machine": machine,
        "records": [small, rooms, *scaling[:2], buffer, *drawn, *scaling[2:]],
    }


def test_the_tables_from_a_result_file():
    content = hand_made()
    content["records"] = content["records"][:8]
    assert (
        table(content)
        == """\
Abacus, 2 CPUs, 1 thread in use; device cpu; torch 2, torchrl 0.14, jax 0.10; Python 3.11

| time / `sample_traces` | S | four rooms |
|---|---|---|
| TorchRL rollout | 89.0 [87.0, 91.2] | 150 |
| JAX jit(scan) | 3.50 [3.40, 3.60] |  |
| the floor | 0.800 |  |

| time / `ValuePrioritizedSampler`, 1e6 entries | update 256, draw 256 |
|---|---|
| cpprb | 7.25 [7.00, 7.50] |

| entries, time / that of 1e6 | refresh (per) |
|---|---|
| 1e7 | 10.0 |

| time / `sample_traces` around M | B 4 | B 16 |
|---|---|---|
| TorchRL rollout | 2.00 | 2.00 |
| JAX jit(scan) | 0.900 | 0.900 |

| case | ours | other | time of the other / ours |
|---|---|---|---|
| buffer, sample | sample_traces alone | with traces | 1.05, at most 1.15 |
| buffer of 1e6, sample(256) | mode per | cpprb | 2.50, at least 0.95 |

Left out: CUDA graph (S, four rooms: needs a CUDA device)."""
    )


def test_the_report_prints_the_named_files_that_hold_times(tmp_path, capsys):
    for name, content in {"times": hand_made(), "other": {"sizes": {}}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    main([str(tmp_path / "times.json"), str(tmp_path / "other.json")])
    assert capsys.readouterr().out == table(hand_made()) + "\n"
    with pytest.raises(SystemExit, match="no results"):
        main([str(tmp_path / "other.json")])


def test_the_figure(tmp_path):
    figure = pytest.importorskip("bench.figure")
    figure.draw(hand_made(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000

"""FourRoomsEnv against a maze written down by hand, and against TorchRL's contract."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from scipy.stats import chi2, chi2_contingency
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_recall.envs import FourRoomsEnv

MAZE_5 = """\
#####
#S  #
# # #
#  G#
#####"""


MAZE_9 = """\
#########
#S  #   #
#       #
#   #   #
## ### ##
#   #   #
#       #
#   #  G#
#########"""

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1)]
UP, DOWN, LEFT, RIGHT = range(4)

# χ² tests fail a correct environment once in a thousand seeds; the seeds are fixed.
ERROR_RATE = 1e-3


def walk(cell, action):
    """One move in the 5 x 5 maze above."""
    row, column = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
    return cell if MAZE_5.splitlines()[row][column] == "#" else (row, column)


def play(env, actions):
    """Step a fixed list of actions; returns the list of next tensordicts."""
    td, out = env.reset(), []
    for action in actions:
        td.set("action", torch.full(env.batch_size, action))
        td, following = env.step_and_maybe_reset(td)
        out.append(td["next"])
        td = following
    return out


def chi_square(counts, probability):
    expected = counts.sum() * probability
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, len(counts) - 1))


class TestMaze:
    @pytest.mark.parametrize(("size", "maze"), [(5, MAZE_5), (9, MAZE_9)])
    def test_layout(self, size, maze):
        env = FourRoomsEnv(size)
        assert env.render() == maze
        assert env.walls.tolist() == [[c == "#" for c in row] for row in maze.splitlines()]
        assert env.goal.tolist() == [size - 2, size - 2]

    @pytest.mark.parametrize("size", [5, 7, 15, 19, 31])
    def test_four_rooms_and_four_doors(self, size):
        walls = FourRoomsEnv(size).walls
        assert (~walls).sum() == (size - 3) ** 2 + 4
        middle = size // 2
        for line in (walls[middle], walls[:, middle]):
            for half in (line[1:middle], line[middle + 1 : -1]):
                assert (~half).sum() == 1
        assert torch.equal(walls, walls.flip(0))
        assert torch.equal(walls, walls.T)

    def test_size_15_has_148_cells(self):
        assert (~FourRoomsEnv().walls).sum() == 148

    def test_every_move_follows_the_map(self):
        env = FourRoomsEnv(5, start="any", batch_size=(64,), seed=0)
        torch.manual_seed(0)
        data = env.rollout(60, break_when_any_done=False).reshape(-1)
        seen = set()
        for cell, action, after, reward, end in zip(
            data["observation"].tolist(),
            data["action"].tolist(),
            data["next", "observation"].tolist(),
            data["next", "reward"].tolist(),
            data["next", "terminated"].tolist(),
            strict=True,
        ):
            seen.add((*cell, action))
            assert tuple(after) == walk(tuple(cell), action)
            assert reward == [float(after == [3, 3])]
            assert end == [after == [3, 3]]
        assert len(seen) == 7 * 4

    def test_delta_support_covers_all_displacements(self):
        env = FourRoomsEnv(7, start="any", slip=0.2, batch_size=(64,), seed=0)
        data = env.rollout(50, break_when_any_done=False).reshape(-1)
        deltas = (data["observation"] - data["next", "observation"]).unique(dim=0)
        assert {tuple(d) for d in deltas.tolist()} == {tuple(d) for d in env.delta_support.tolist()}
        assert env.delta_support.tolist() == [[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]


class TestEpisodes:
    def test_shortest_path_pays_once(self):
        steps = play(FourRoomsEnv(5), [RIGHT, RIGHT, DOWN, DOWN])
        assert [s["reward"].item() for s in steps] == [0, 0, 0, 1]
        assert [s["terminated"].item() for s in steps] == [False, False, False, True]
        assert steps[-1]["reward"].dtype == torch.float32

    @pytest.mark.parametrize(("max_steps", "limit"), [("auto", 50), (3, 3), (1, 1)])
    def test_time_limit_truncates(self, max_steps, limit):
        env = FourRoomsEnv(5, max_steps=max_steps)
        steps = play(env, [UP] * (2 * limit))
        assert env.max_steps == limit
        ends = [(t + 1) % limit == 0 for t in range(2 * limit)]
        assert [s["truncated"].item() for s in steps] == ends
        assert [s["done"].item() for s in steps] == ends
        assert not any(s["terminated"].item() for s in steps)

    def test_no_time_limit(self):
        steps = play(FourRoomsEnv(5, max_steps=None), [UP] * 200)
        assert not any(s["done"].item() or s["truncated"].item() for s in steps)

    def test_partial_reset(self):
        env = FourRoomsEnv(5, batch_size=(3,), max_steps=4)
        td = env.reset()
        for _ in range(2):
            td = env.step(td.set("action", torch.full((3,), RIGHT)))["next"]
        td = td.select("observation", "done", "terminated", "truncated")
        td = env.reset(td.set("_reset", torch.tensor([[True], [False], [True]])))
        assert td["observation"].tolist() == [[1, 1], [1, 3], [1, 1]]
        ends = []
        for _ in range(4):
            td = env.step(td.set("action", torch.full((3,), UP)))["next"]
            ends.append(td["truncated"].squeeze(-1).tolist())
        # Maze 1 kept its two steps; the others count from zero.
        assert ends[1] == [False, True, False]
        assert ends[3] == [True, True, True]

    def test_rollout_starts_again_after_the_goal(self):
        env = FourRoomsEnv(5, batch_size=(32,), seed=0)
        data = env.rollout(300, break_when_any_done=False)
        after_end = data["observation"][:, 1:][data["next", "done"][:, :-1, 0]]
        assert len(after_end) > 100
        assert (after_end == 1).all()
        assert data["next", "terminated"].any()
        assert data["next", "truncated"].any()

    def test_masked_mazes_hold_still(self):
        env = FourRoomsEnv(5, batch_size=(3,), max_steps=5)
        td = env.reset()
        for t, action in enumerate((RIGHT, RIGHT, DOWN, DOWN)):
            td.set("_step", torch.tensor([True, False, t < 3]))
            td = env.step(td.set("action", torch.full((3,), action)))["next"]
        # Maze 2 holds in front of the goal, its action notwithstanding.
        assert td["observation"].tolist() == [[3, 3], [1, 1], [2, 3]]
        assert td["reward"].tolist() == [[1], [0], [0]]
        ends = []
        for _ in range(5):
            td = env.step(td.set("action", torch.full((3,), UP)))["next"]
            ends.append(td["truncated"].squeeze(-1).tolist())
        assert ends.index([True, False, False]) == 0
        assert ends.index([True, False, True]) == 1
        assert ends.index([True, True, True]) == 4

    def test_rollout_until_all_are_done(self):
        env = FourRoomsEnv(5, batch_size=(16,), seed=0)
        data = env.rollout(60, break_when_all_done=True)
        assert data["next", "done"][:, -1].all()


class TestStarts:
    def test_fixed(self):
        env = FourRoomsEnv(15, batch_size=(8,))
        assert (env.reset()["observation"] == 1).all()
        assert env.start_probability.nonzero().tolist() == [[16]]

    @pytest.mark.parametrize(("start", "number"), [("room", 36), ("any", 147)])
    def test_uniform(self, start, number):
        env = FourRoomsEnv(15, start=start, batch_size=(100 * number,), seed=0)
        row, column = env.reset()["observation"].unbind(-1)
        counts = torch.zeros(15, 15).index_put_((row, column), torch.tensor(1.0), accumulate=True)
        support = env.start_probability.view(15, 15) > 0
        assert support.sum() == number
        assert not (support & env.walls).any()
        assert counts[~support].sum() == 0
        assert not support[13, 13]
        if start == "room":
            assert support[1:7, 1:7].all()
        assert env.start_probability.sum().item() == pytest.approx(1, abs=1e-12)
        assert chi_square(counts[support], 1 / number) > ERROR_RATE


class TestSlip:
    @pytest.mark.parametrize("slip", [0.2, 1.0])
    def test_frequencies(self, slip):
        # From (2, 2) of a 9 x 9 maze all four moves lead elsewhere.
        env = FourRoomsEnv(9, slip=slip, batch_size=(40_000,), seed=0, start="room")
        td = env.reset()
        inside = (td["observation"] == 2).all(-1)
        td = env.step(td.set("action", torch.full((40_000,), RIGHT)))
        moved = (td["next", "observation"] - 2)[inside].tolist()
        counts = torch.tensor([float(moved.count(list(m))) for m in MOVES])
        assert counts.sum() == inside.sum()
        probability = torch.full((4,), slip / 4)
        probability[RIGHT] += 1 - slip
        assert chi_square(counts, probability) > ERROR_RATE


class TestSeeds:
    @staticmethod
    def make(**kwargs):
        return FourRoomsEnv(7, start="any", slip=0.3, batch_size=(8,), **kwargs)

    @staticmethod
    def run(env, steps=30):
        return [s["observation"] for s in play(env, [t % 4 for t in range(steps)])]

    def same(self, one, other):
        return all(map(torch.equal, one, other))

    def test_seed_decides(self):
        first = self.run(self.make(seed=1))
        assert self.same(first, self.run(self.make(seed=1)))
        assert not self.same(first, self.run(self.make(seed=2)))
        env = self.make()
        env.set_seed(1)
        assert self.same(first, self.run(env))

    def test_global_generator_is_left_alone(self):
        env = self.make(seed=1)
        before = torch.get_rng_state()
        self.run(env)
        assert torch.equal(before, torch.get_rng_state())

    def test_without_a_seed_the_global_one_decides(self):
        torch.manual_seed(5)
        first, second = self.run(self.make()), self.run(self.make())
        torch.manual_seed(5)
        assert self.same(first, self.run(self.make()))
        assert not self.same(first, second)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))]
    )
    def test_copies_go_on_alike(self, duplicate):
        env = self.make(seed=1)
        self.run(env)
        other = duplicate(env)
        assert self.same(self.run(env), self.run(other))

    def test_state_dict_resumes_mid_episode(self):
        env, other = self.make(seed=1, max_steps=9), self.make(seed=2, max_steps=9)
        td = env.rollout(5, break_when_any_done=False)[:, -1]["next"]
        td = td.select("observation", "done", "terminated", "truncated")
        other.load_state_dict(env.state_dict())
        for t in range(20):
            td.set("action", torch.full((8,), t % 4))
            one, td_one = env.step_and_maybe_reset(td.clone())
            two, td_two = other.step_and_maybe_reset(td.clone())
            assert (one == two).all()
            assert (td_one == td_two).all()
            td = td_one


class TestContract:
    @pytest.mark.parametrize("batch_size", [(), (16,), (3, 2)])
    @pytest.mark.parametrize(
        "kwargs", [{}, {"start": "any", "slip": 0.1}, {"start": "room", "max_steps": None}]
    )
    def test_specs(self, batch_size, kwargs):
        env = FourRoomsEnv(7, batch_size=batch_size, **kwargs)
        check_env_specs(env)
        td = env.reset()
        assert td["observation"].shape == (*batch_size, 2)
        assert td["observation"].dtype == torch.int64
        assert env.action_spec.n == 4
        assert td.device == env.device

    @pytest.mark.parametrize("wrapper", [SerialEnv, ParallelEnv])
    def test_batched_by_torchrl(self, wrapper):
        env = wrapper(2, functools.partial(FourRoomsEnv, 5, start="any", slip=0.1))
        try:
            env.set_seed(0)
            data = env.rollout(120, break_when_any_done=False)
        finally:
            env.close()
        assert data.shape == (2, 120)
        assert data["next", "done"].any()
        assert not torch.equal(data["observation"][0], data["observation"][1])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_cuda(self):
        env = FourRoomsEnv(15, batch_size=(4096,), start="any", slip=0.1, device="cuda")
        check_env_specs(env)
        assert env.rollout(20, break_when_any_done=False).device.type == "cuda"
        moved = FourRoomsEnv(15, batch_size=(8,), start="any", slip=0.1).to("cuda")
        assert moved.rollout(5, break_when_any_done=False).device.type == "cuda"


def test_own_stream_whatever_the_seed():
    """Starts do not tell the policy's first action, though torch has the environment's seed."""
    env = FourRoomsEnv(7, start="room", batch_size=(4000,), seed=0)
    torch.manual_seed(0)
    data = env.rollout(1)
    start = ((data["observation"][:, 0] - 1) * torch.tensor([2, 1])).sum(-1)
    table = torch.zeros(4, 4).index_put_(
        (start, data["action"][:, 0]), torch.ones(4000), accumulate=True
    )
    # Error rate 1e-4.
    assert chi2_contingency(table.numpy()).pvalue > 1e-4


class TestErrors:
    @pytest.mark.parametrize(
        ("size", "error", "message"),
        [
            (3, ValueError, "size must be an odd integer of at least 5, got 3"),
            (8, ValueError, "size must be an odd integer of at least 5, got 8"),
            (-5, ValueError, "size must be at least 1, got -5"),
            (15.0, TypeError, "size must be an int of at least 1, got float 15.0"),
        ],
    )
    def test_size(self, size, error, message):
        with pytest.raises(error, match=message):
            FourRoomsEnv(size)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"start": "goal"}, "start must be one of .*got 'goal'"),
            ({"slip": 1.5}, r"slip must lie in \[0.0, 1.0\], got 1.5"),
            ({"slip": float("nan")}, r"slip must lie in \[0.0, 1.0\], got nan"),
            ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
            ({"max_steps": "never"}, "max_steps must be an int of at least 1, got str never"),
            ({"max_steps": True}, "max_steps must be an int of at least 1, got bool True"),
        ],
    )
    def test_others(self, kwargs, message):
        with pytest.raises((ValueError, TypeError), match=message):
            FourRoomsEnv(5, **kwargs)

    @pytest.mark.parametrize("action", [-1, 4, 24])
    def test_actions_outside_are_refused(self, action):
        env = FourRoomsEnv(5, seed=0)
        with pytest.raises(ValueError, match=f"action must lie in 0 to 3, got {action}"):
            env.step(env.reset().set("action", torch.tensor(action)))

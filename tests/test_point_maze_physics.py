"""PointMazeEnv moves as scalar physics written as a search for contacts; its maps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from torchrl_recall.envs import PointMazeEnv
from torchrl_recall.envs.maze_map import LAYOUTS

MARGIN = 1e-3
# Statistical tests fail a correct environment once in a thousand seeds; the seeds are fixed.
ERROR_RATE = 1e-3


def boxes(rows):
    """Wall cells as (left, right, bottom, top), y upwards."""
    height = len(rows)
    cells = itertools.product(range(height), range(len(rows[0])))
    return [(x, x + 1, height - 1 - r, height - r) for r, x in cells if rows[r][x] == "#"]


def first_contact(rows, start, step, axis):
    """Where a point that moves along an axis stops: the nearest wall whose side it would pass."""
    place, across = start[axis], start[1 - axis]
    end = place + step
    for box in boxes(rows):
        near, far = box[2 * axis : 2 * axis + 2]
        low, high = box[2 - 2 * axis : 4 - 2 * axis]
        if not low <= across < high:
            continue
        if step > 0 and place < near:
            end = min(end, max(place, near - MARGIN))
        if step < 0 and place >= far:
            end = max(end, min(place, far + MARGIN))
    return end


def reference_step(rows, state, action, step_size, inertia=None):
    """One step of one point in Python floats, its walls looked through one by one."""
    x, y, *velocity = state
    change = [step_size * min(max(a, -1.0), 1.0) for a in action]
    if velocity:
        change = [inertia * v + (1 - inertia) * c for v, c in zip(velocity, change, strict=True)]
        change = [min(max(v, -step_size), step_size) for v in change]
    for left, right, bottom, top in boxes(rows):
        if left <= x < right and bottom <= y < top:
            return [x, y, *(0.0 for _ in velocity)]
    new_x = first_contact(rows, (x, y), change[0], 0)
    new_y = first_contact(rows, (new_x, y), change[1], 1)
    after = [new_x, new_y]
    if velocity:
        free = [new_x == x + change[0], new_y == y + change[1]]
        after += [v if moved else 0.0 for v, moved in zip(change, free, strict=True)]
    return after


class TestPhysics:
    @pytest.mark.parametrize("layout", sorted(LAYOUTS))
    @pytest.mark.parametrize("dynamics", ["position", "velocity"])
    @pytest.mark.parametrize("step_size", [0.25, 4.0])
    def test_against_contacts_searched_one_by_one(self, layout, dynamics, step_size):
        env = PointMazeEnv(layout, dynamics=dynamics, step_size=step_size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        height, width = env.walls.shape
        size = torch.tensor([width, height], dtype=torch.float64)
        # Places in walls as well; those at a wall's side get a step along it, too.
        state = torch.rand(500, 2, generator=generator, dtype=torch.float64) * size
        # On the borders of cells.
        state[200:300, 1] = state[200:300, 1].floor()
        state[250:350, 0] = state[250:350, 0].floor()
        if dynamics == "velocity":
            speed = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 2 - 1
            state = torch.cat([state, step_size * speed], -1)
        stopped = 0
        for _ in range(3):
            action = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 3 - 1.5
            action[:100, 0] = 0.0
            action[100:200, 1] = 0.0
            after = env.step_states(state, action)
            expected = [
                reference_step(LAYOUTS[layout], s, a, step_size, env.inertia)
                for s, a in zip(state.tolist(), action.tolist(), strict=True)
            ]
            torch.testing.assert_close(
                after, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
            )
            ends = torch.tensor([MARGIN, 1 - MARGIN]).double()
            stopped += ((after[:, :2] % 1).unsqueeze(-1) - ends).abs().lt(1e-9).any((1, 2)).sum()
            state = after
        assert stopped > 15

    def test_by_hand(self):
        # The U: free are x 1 to 4 with y 1 to 2 and 3 to 4, and the cell (3, 2) between them.
        env = PointMazeEnv("u", step_size=1.0, dtype=torch.float64)
        for state, action, after in [
            ((1.5, 1.5), (1.0, 0.25), (2.5, 1.75)),
            ((1.5, 1.5), (-1.0, -1.0), (1.001, 1.001)),
            ((2.9, 1.5), (0.2, 1.0), (3.1, 2.5)),  # x first: round the corner
            ((3.1, 1.5), (-0.2, 1.0), (2.9, 1.999)),
            ((3.5, 2.5), (-1.0, 0.0), (3.001, 2.5)),
            ((3.0, 2.5), (0.0, 0.1), (3.0, 2.6)),  # nearer than the margin: not pushed away
            ((2.5, 2.5), (1.0, 1.0), (2.5, 2.5)),  # in a wall
            ((-7.0, 99.0), (1.0, 1.0), (-7.0, 99.0)),  # outside
            ((1.5, 1.5), (9.0, 0.0), (2.5, 1.5)),  # actions are clipped
        ]:
            got = env.step_states(torch.tensor(state).double(), torch.tensor(action).double())
            assert got.tolist() == pytest.approx(after, abs=1e-6)

    def test_no_tunnelling_however_long_the_step(self):
        env = PointMazeEnv("u", step_size=1e6)
        state = torch.tensor([1.5, 1.5])
        for action, after in [((0, 1), (1.5, 1.999)), ((1, 1), (3.999, 3.999)), ((0, -1),) * 2]:
            state = env.step_states(state, torch.tensor(action).float())
            if after != (0, -1):
                assert state.tolist() == pytest.approx(after)
        assert state.tolist() == pytest.approx((3.999, 1.001))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kwargs", [{}, {"noise": 3.0}, {"dynamics": "velocity"}])
    def test_never_in_a_wall(self, dtype, kwargs):
        # 1e5 steps each, most of them into a wall.
        options = {"start": "any", "step_size": 0.7, "max_steps": None, "dtype": dtype}
        env = PointMazeEnv("large", batch_size=(1000,), seed=0, **options, **kwargs)
        data = env.rollout(100, break_when_any_done=False)
        states = data["next", "observation"].reshape(-1, data["observation"].shape[-1])
        assert len(states) == 100_000
        cell = states[:, :2].double().numpy().astype(int)
        rows = LAYOUTS["large"][::-1]
        assert {rows[y][x] for x, y in set(map(tuple, cell.tolist()))} == {" ", "S", "G"}
        assert env.free(states).all()
        offset = states[:, :2].double() % 1
        assert ((offset - MARGIN).abs() < 1e-5).any(1).sum() > 1000

    def test_velocity_by_hand(self):
        env = PointMazeEnv("u", dynamics="velocity", step_size=0.5, inertia=0.6)
        state = torch.tensor([1.5, 1.5, 0.2, 0.0])
        state = env.step_states(state, torch.tensor([1.0, -0.5]))
        # v = 0.6 v + 0.4 * 0.5 a
        assert state.tolist() == pytest.approx([1.82, 1.4, 0.32, -0.1])
        for _ in range(30):
            state = env.step_states(state, torch.tensor([0.0, -1.0]))
        assert state[1:].tolist() == pytest.approx([1.001, 0.0, 0.0], abs=1e-6)

    def test_a_step_and_step_states_are_one(self):
        env = PointMazeEnv("large", start="any", batch_size=(64,), seed=0)
        td = env.rand_action(env.reset())
        after = env.step(td)["next", "observation"]
        assert torch.equal(after, env.step_states(td["observation"], td["action"]))
        wide = env.step_states(td["observation"].expand(5, 64, 2), td["action"])
        assert torch.equal(wide, after.expand(5, 64, 2))

    def test_noise_is_gaussian_in_the_open(self):
        env = PointMazeEnv("u", noise=0.5, step_size=0.1, batch_size=(4000,), seed=0)
        td = env.step(env.reset().set("action", torch.full((4000, 2), 0.2)))
        noise = (td["next", "observation"] - td["observation"]) / 0.1 - 0.2
        for column in noise.T:
            assert kstest(column.numpy() / 0.5, "norm").pvalue > ERROR_RATE
        assert abs(np.corrcoef(noise.T.numpy())[0, 1]) < 3.3 / 4000**0.5

    def test_compiled(self):
        env = PointMazeEnv("large", dynamics="velocity", start="any", batch_size=(256,), seed=0)
        td = env.rollout(3)[:, -1]
        compiled = torch.compile(env.step_states, fullgraph=True, backend="aot_eager")
        expected = env.step_states(td["observation"], td["action"])
        assert torch.equal(compiled(td["observation"], td["action"]), expected)


class TestMaps:
    @pytest.mark.parametrize("layout", sorted(LAYOUTS))
    def test_layouts_are_drawn_back(self, layout):
        assert PointMazeEnv(layout).render() == "\n".join(LAYOUTS[layout])

    def test_own_map(self):
        text = "######\n#S # #\n#    #\n######"
        env = PointMazeEnv(text, goal="any", goal_in_observation=True)
        assert env.render() == text
        assert PointMazeEnv(text.split("\n"), start="any", goal="any", goal_in_observation=True)

    def test_draw(self):
        figure = pytest.importorskip("matplotlib.figure").Figure()
        axis = figure.add_subplot()
        PointMazeEnv("large").draw(axis)
        assert axis.get_xlim() == (0, 12)
        assert axis.get_ylim() == (0, 9)
        ring = axis.patches[0].get_path().vertices
        assert ring.mean(0) == pytest.approx([1.5, 7.5], abs=0.02)
        assert axis.lines[0].get_xydata().tolist() == [[10.5, 1.5]]
        # A wall's shade where the wall is.
        assert axis.images[0].get_array().tolist()[0] == [0.25] * 12

    @pytest.mark.parametrize(
        ("maze", "message"),
        [
            ("tiny", "maze must be one of .*'large', 'u'.*got 'tiny'"),
            (["####", "#SG#"], "maze must have walls .* all around"),
            (["#####", "#S#G#", "#####"], "maze must be in one piece, got 2 separate parts"),
            (["####", "#SG", "####"], r"maze must have rows of one length, got \[4, 3, 4\]"),
            (["####", "#S.#", "####"], r"maze must consist of .*got \['.'\]"),
            (["#####", "#SSG#", "#####"], "maze must have one 'S' at most, got 2"),
            (["####", "#S #", "####"], "maze must have an 'G' for it to be fixed"),
            (["####", "####"], "maze must have a free cell"),
            ([], "maze must have rows of one length"),
        ],
    )
    def test_refused(self, maze, message):
        with pytest.raises(ValueError, match=message):
            PointMazeEnv(maze)

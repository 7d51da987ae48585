"""Pictures of mazes, of traces in them, and of learning curves: what is drawn is what was given."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict

from torchrl_recall.diagnostics import animate_traces, draw_maze, draw_traces, plot_curves
from torchrl_recall.envs import FourRoomsEnv, PointMazeEnv


@pytest.fixture
def axes():
    return Figure().subplots()


def rollout(states, mask=None):
    """A trace ``[1, T]`` through ``states``, a list of places."""
    states = torch.as_tensor(states).unsqueeze(0)
    entries = {"observation": states[:, :-1], "next": {"observation": states[:, 1:]}}
    if mask is not None:
        entries["collector"] = {"mask": torch.tensor([mask])}
    return TensorDict(entries, [1, states.shape[1] - 1])


def test_values_lie_on_the_free_cells(axes):
    env = FourRoomsEnv(7)
    values = torch.arange(49.0)
    shown = draw_maze(axes, env, values, vmin=0, vmax=50).get_array()
    free = ~env.walls.numpy()
    assert (~shown.mask == free).all()
    assert (shown.data[free] == values.view(7, 7).numpy()[free]).all()


def test_goal_of_four_rooms_is_at_its_column_and_row(axes):
    draw_maze(axes, FourRoomsEnv(7))
    (star,) = axes.lines
    assert star.get_xydata().tolist() == [[5, 5]]
    assert [text.get_text() for text in axes.texts] == ["S"]


def test_point_maze_draws_itself_and_has_no_cells(axes):
    assert draw_maze(axes, PointMazeEnv()) is None
    assert axes.images
    with pytest.raises(ValueError, match="values are for the cells"):
        draw_maze(axes, PointMazeEnv(), torch.zeros(25))


def test_wrong_mazes_and_values_are_refused(axes):
    with pytest.raises(TypeError, match="env must be a FourRoomsEnv or PointMazeEnv, got str"):
        draw_maze(axes, "u")  # pyright: ignore
    with pytest.raises(ValueError, match="expected one for each of 49 cells"):
        draw_maze(axes, FourRoomsEnv(7), torch.zeros(25))


def test_segments_are_the_kept_steps_as_x_and_y(axes):
    trace = rollout([[1.0, 2.0, 9.0], [1.5, 2.0, 9.0], [1.5, 3.0, 9.0]], [False, True])
    lines = draw_traces(axes, trace)
    (segment,) = lines.get_segments()
    assert segment.tolist() == [[1.5, 2.0], [1.5, 3.0]]
    assert lines.get_array().tolist() == [1]  # one step before the end


def test_oldest_lie_below_and_are_brightest(axes):
    trace = rollout([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    lines = draw_traces(axes, trace)
    assert lines.get_array().tolist() == [3, 2, 1]
    assert [segment[0][0] for segment in lines.get_segments()] == [0, 1, 2]


def test_discrete_states_are_rows_and_columns_and_jittered_together(axes):
    trace = rollout([[1, 2], [1, 3], [2, 3]])
    moved = draw_traces(axes, trace, jitter=0.0).get_segments()
    assert [s.tolist() for s in moved] == [[[2, 1], [3, 1]], [[3, 1], [3, 2]]]
    shifted = draw_traces(axes, trace).get_segments()
    off = shifted[0][0] - moved[0][0]
    assert 0 < abs(off).max() <= 0.28
    for a, b in zip(shifted, moved, strict=True):
        assert a == pytest.approx(b + off)


def test_traces_without_time_or_plane_are_refused(axes):
    with pytest.raises(ValueError, match=r"expected \[\*B, T\]"):
        draw_traces(axes, TensorDict({"observation": torch.zeros(2)}))
    with pytest.raises(ValueError, match="observation has shape"):
        draw_traces(axes, rollout([[1.0], [2.0]]))
    with pytest.raises(KeyError, match="observation"):
        draw_traces(axes, TensorDict({"state": torch.zeros(1, 2, 2)}, [1, 2]))


def test_film_walks_back_and_stops_at_what_is_masked(axes):
    trace = rollout([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], [False, True, True])
    film = animate_traces(axes.figure, axes, trace, trail=2)
    tail, head = axes.lines
    seen = []
    for frame in film.new_frame_seq():
        film._func(frame)
        seen.append((tail.get_xdata().tolist(), head.get_xdata().tolist()))
    # The trail of two steps ends where the walk began, three steps back only two are real.
    assert seen == [([3], [3]), ([2, 3], [2]), ([1, 2, 3], [1]), ([1, 2, 3], [1])]
    film._draw_was_started = True  # nothing is played here


def test_curves_are_mean_band_and_seeds(axes):
    values = torch.tensor([[0.0, 2.0], [1.0, 4.0], [5.0, 3.0]])
    plot_curves(axes, torch.tensor([1, 2]), {"ours": values})
    *seeds, mean = axes.lines
    assert [line.get_ydata().tolist() for line in seeds] == values.tolist()
    assert mean.get_ydata().tolist() == [2, 3]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(1, 0), (1, 5), (2, 2), (2, 4)} <= corners
    many = Figure().subplots()
    plot_curves(many, torch.tensor([1, 2]), {"ours": torch.rand(6, 2)})
    assert len(many.lines) == 1


def test_wrong_curves_are_refused(axes):
    x = torch.arange(3)
    with pytest.raises(ValueError, match=r"expected one number for each seed and point, \[seeds"):
        plot_curves(axes, x, {"ours": torch.zeros(3)})
    with pytest.raises(ValueError, match="must be finite"):
        plot_curves(axes, x, {"ours": torch.tensor([[0.0, torch.nan, 0.0]])})
    with pytest.raises(ValueError, match="at most 6"):
        plot_curves(axes, x, {str(i): torch.zeros(1, 3) for i in range(7)})

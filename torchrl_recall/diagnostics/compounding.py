"""How errors add up along a trace: its actions replayed in the real environment.

From the state k steps before the end of a trace, its last k actions should lead where the trace
ends. `replay.py` makes the ``step`` of common environments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_at_least_one, check_keys
from torchrl_recall.state_reading import entry, trace_states

Step = Callable[[Tensor, Tensor], Tensor]


class CompoundingError(NamedTuple):
    """Distance between traces and the real environment, in standard deviations of the state.

    A trace's error is the root mean square over dimensions of (replayed - trace) / scale. Replays
    that leave the finite numbers count as infinitely wrong.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> trace = TensorDict({"observation": torch.tensor([[[0.0], [1.0]]])}, [1, 2])
        >>> trace["action"] = torch.ones(1, 2, 1)
        >>> trace["next", "observation"] = torch.tensor([[[1.0], [2.5]]])
        >>> compounding_error(trace, lambda s, a: s + a, steps=(1, 2)).scalars()["mean_2"]
        0.5
    """

    steps: Tensor
    """How many steps before the end a replay began, int64 ``[K]``."""
    error: Tensor
    """At the end of each trace, ``[K, N]``; NaN where one of its last k steps is masked."""
    mean: Tensor
    """Over traces, ``[K]``; NaN if none has so many steps."""
    standard_error: Tensor
    """Of the mean, traces taken as independent, ``[K]``."""
    median: Tensor
    """Over traces, ``[K]``: the mean follows the worst of them."""
    num_traces: Tensor
    """Traces that counted, int64 ``[K]``."""
    path: Tensor
    """Median error after 1, 2, ... steps of the longest replay, ``[max(steps)]``. Where friction
    forgets where a replay began, errors begin large here and end small."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        named = {}
        for i, k in enumerate(self.steps.tolist()):
            named[f"mean_{k}"] = float(self.mean[i])
            named[f"median_{k}"] = float(self.median[i])
        return named


@torch.no_grad()
def compounding_error(
    trace: TensorDictBase,
    step: Step,
    scale: Tensor | float = 1.0,
    *,
    steps: Sequence[int] = (1, 5, 10, 20),
    observation_keys: NestedKey | list[NestedKey] = "observation",
    action_key: NestedKey = "action",
) -> CompoundingError:
    """Replay the actions of traces in the real environment, and compare where they lead.

    For each k the environment is put into the state k steps before the end of each trace, and the
    trace's last k actions are taken. The dynamics should be deterministic, or the error of a
    perfect model is that of their noise; and where small errors grow by themselves (contact,
    chaos), so does this number. Put real trajectories in the place of traces to see its floor.

    Args:
        trace (TensorDictBase): ``[*B, T]``, oldest step first, as `sample_traces` returns it; any
            rollout with ``("next", observation)`` will do.
        step (callable): ``(state [N, D], action [N, *A]) -> next state [N, D]``, in the units of
            the data; several observation keys are concatenated.
        scale (Tensor or float): ``[D]`` standard deviation of each dimension of the state, for
            example ``model.observation.normalizer.std``.

    Keyword Args:
        steps (sequence of int): how many steps before the end to begin.
        observation_keys (NestedKey or list of NestedKey): the observations that make up the state.
        action_key (NestedKey): the action.

    Returns:
        CompoundingError: by number of steps.

    Raises:
        KeyError: a key is missing.
        ValueError: more steps than a trace has, a scale that is not positive, or wrong shapes.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> from torchrl_recall.diagnostics import compounding_error
        >>> model = BacktrackModel(2, 2, num_cells=(32,))
        >>> trace = sample_traces(model, torch.zeros(16, 2), num_steps=10)
        >>> found = compounding_error(trace, lambda s, a: s + a, steps=(1, 5, 10))
        >>> found.mean.shape, found.error.shape
        (torch.Size([3]), torch.Size([3, 16]))
    """
    states, actions, mask = _columns(trace, observation_keys, action_key)
    length = actions.shape[1]
    chosen = [check_at_least_one("steps", k) for k in steps]
    if not chosen or max(chosen) > length:
        raise ValueError(f"steps must lie in 1 to {length}, the length of the traces, got {steps}.")
    scale = torch.as_tensor(scale, dtype=torch.float64, device=states.device)
    size = states.shape[-1]
    if scale.shape not in ((), (size,)) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"scale must hold {size} positive finite numbers, got {scale}.")
    last = {k: mask[:, length - k :].all(-1) for k in chosen}
    paths = {k: replay_error(states, actions, step, scale, k) for k in sorted(set(chosen))}
    nothing = torch.full((len(states),), torch.nan, dtype=torch.float64, device=states.device)
    error = torch.stack([torch.where(last[k], paths[k][:, -1], nothing) for k in chosen])
    count = torch.stack([last[k].sum() for k in chosen])
    mean = error.nanmean(-1)
    squares = (error - mean.unsqueeze(-1)).square().nansum(-1)
    standard_error = torch.where(count > 1, (squares / (count - 1) / count).sqrt(), torch.inf)
    longest = max(chosen)
    path = torch.where(last[longest].unsqueeze(-1), paths[longest], nothing.unsqueeze(-1))
    return CompoundingError(
        torch.tensor(chosen, device=states.device),
        error,
        mean,
        standard_error,
        error.nanmedian(-1).values,
        count,
        path.nanmedian(0).values,
    )


def replay_error(states: Tensor, actions: Tensor, step: Step, scale: Tensor, k: int) -> Tensor:
    """Replay the last ``k`` actions of traces, and compare every state on the way.

    Args:
        states (Tensor): ``[N, T + 1, D]``, oldest first.
        actions (Tensor): ``[N, T, *A]``.
        step (callable): ``(state [N, D], action [N, *A]) -> next state [N, D]``.
        scale (Tensor): ``[D]`` or a number.
        k (int): steps, 1 to T.

    Returns:
        Tensor: ``[N, k]`` float64, root mean square over dimensions; infinite where the replay is
        not finite.

    Raises:
        ValueError: ``step`` returns another shape.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import replay_error
        >>> states = torch.tensor([[[0.0], [1.0], [4.0]]])  # the second step is too long by 2
        >>> actions = torch.ones(1, 2, 1)
        >>> replay_error(states, actions, lambda s, a: s + a, torch.tensor(2.0), 2).tolist()
        [[0.0, 1.0]]
    """
    length = actions.shape[1]
    state, errors = states[:, length - k], []
    for t in range(length - k, length):
        state = step(state, actions[:, t])
        if state.shape != states[:, t].shape:
            raise ValueError(
                f"step returned shape {tuple(state.shape)}, expected {tuple(states[:, t].shape)}."
            )
        off = (state.double() - states[:, t + 1].double()) / scale
        errors.append(off.square().mean(-1).sqrt().nan_to_num(torch.inf, torch.inf))
    return torch.stack(errors, -1)


def _columns(trace, observation_keys, action_key) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[N, T + 1, D]``, actions ``[N, T, *A]`` and mask ``[N, T]``."""
    if trace.ndim == 0 or trace.shape.numel() == 0:
        raise ValueError(f"trace has batch size {tuple(trace.shape)}, expected [*B, T].")
    trace = trace.reshape(-1, trace.shape[-1])
    states = trace_states(trace, check_keys("observation_keys", observation_keys))
    mask = trace.get(("collector", "mask"), default=None)
    if mask is None:
        mask = torch.ones(trace.shape, dtype=torch.bool, device=states.device)
    return states, entry(trace, action_key, "the trace"), mask.reshape(trace.shape)

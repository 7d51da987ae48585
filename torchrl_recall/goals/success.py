"""How often goals are reached: what `GoalGAN` labels its goals by.

Between the collector and `GoalGAN.update`.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_recall.masking import one_each
from torchrl_recall.starts.batch import unmasked_rows
from torchrl_recall.state_reading import entry


def success_rates(
    data: TensorDictBase,
    *,
    goal_key: NestedKey = "goal",
    success_key: NestedKey = ("next", "success"),
    done_key: NestedKey | None = ("next", "done"),
) -> TensorDict:
    """Count, for each goal, the share of its episodes that ended in success.

    Args:
        data (TensorDictBase): steps ``[*B]`` of any number of episodes, as collectors return them.
            A step at which an episode is done counts as this episode; other steps, unfinished
            episodes and padding, masked at ``("collector", "mask")``, do not count.

    Keyword Args:
        goal_key (NestedKey): the episode's goal, ``[*B, D]``, at the step at which it is done.
        success_key (NestedKey): whether the goal was reached, ``[*B]`` or ``[*B, 1]``, 0 or 1.
        done_key (NestedKey, optional): where the end of an episode is marked, ``[*B]`` or
            ``[*B, 1]``. None: each row is an episode.

    Returns:
        TensorDict: of batch ``[G]``, one row for each distinct goal, in lexical order: ``"goal"``
        ``[G, D]``, ``"success_rate"`` ``[G]`` in the goals' dtype (torch's default if they are
        integers) and ``"count"`` ``[G]``, the number of episodes. ``G`` is 0 if none has ended.

    Raises:
        KeyError: a key is missing.
        ValueError: goals of a wrong shape, non-finite goals, or a success that is neither 0 nor 1.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> goal = torch.tensor([[2.0], [1.0], [1.0]])
        >>> success = torch.tensor([True, False, True])
        >>> data = TensorDict({"goal": goal, "next": {"success": success}}, [3])
        >>> rates = success_rates(data, done_key=None)
        >>> rates["goal"].flatten(), rates["success_rate"]
        (tensor([1., 2.]), tensor([0.5000, 1.0000]))
    """
    counted = unmasked_rows(data)
    if done_key is not None:
        done = one_each(data, entry(data, done_key), f"done_key {done_key!r}")
        counted = counted & done.bool()
    goal, success = entry(data, goal_key), entry(data, success_key)
    if goal.ndim != data.ndim + 1:
        raise ValueError(
            f"goal_key {goal_key!r} has shape {tuple(goal.shape)}, expected [*batch, D] with the "
            f"batch {tuple(data.shape)}."
        )
    success = one_each(data, success, f"success_key {success_key!r}")[counted]
    goal = goal[counted]
    if not bool(torch.isfinite(goal).all()):
        raise ValueError(f"goal_key {goal_key!r} must be finite where episodes end.")
    dtype = goal.dtype if goal.is_floating_point() else torch.get_default_dtype()
    success = success.to(dtype)
    if not bool(((success == 0) | (success == 1)).all()):
        raise ValueError(f"success_key {success_key!r} must be 0 or 1 where episodes end.")
    goals, which = goal.unique(dim=0, return_inverse=True)
    count = torch.bincount(which, minlength=len(goals))
    reached = success.new_zeros(len(goals)).index_add_(0, which, success)
    rates = {"goal": goals, "success_rate": reached / count, "count": count}
    return TensorDict(rates, [len(goals)])

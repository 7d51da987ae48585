"""Results of the diagnostics into TorchRL's loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def log_diagnostics(
    logger: Any,
    results: Mapping[str, Any],
    step: int | None = None,
    *,
    figures: bool = True,
) -> dict[str, float]:
    """Write diagnostics into a logger: their scalars, and their pictures where it takes some.

    Args:
        logger (torchrl.record.loggers.Logger): anything with ``log_scalar(name, value, step)``.
            Pictures go to loggers whose ``experiment`` has ``add_figure`` (TensorBoard).
        results (mapping): name to result, any of this package's result types (they have
            ``scalars()``).
        step (int, optional): step of the log.

    Keyword Args:
        figures (bool): draw pictures (needs matplotlib) where the logger takes them.

    Returns:
        dict: what was written, ``"<name>/<scalar>"`` to number. Numbers that are not finite are
        left out of the log and are in this dict.

    Raises:
        TypeError: not a logger, or a result without ``scalars()``.

    Examples:
        >>> import tempfile, torch
        >>> from torchrl.record.loggers import CSVLogger
        >>> from torchrl_recall.diagnostics import goal_coverage, log_diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = CSVLogger("run", folder)
        ...     coverage = goal_coverage(torch.tensor([True, False]))
        ...     sorted(log_diagnostics(logger, {"goals": coverage}, step=3))
        ['goals/high', 'goals/low', 'goals/share']
    """
    if not callable(getattr(logger, "log_scalar", None)):
        raise TypeError(f"logger must have log_scalar, got {type(logger).__name__}.")
    for name, result in results.items():
        if not callable(getattr(result, "scalars", None)):
            raise TypeError(
                f"results[{name!r}] must be a result of the diagnostics, got "
                f"{type(result).__name__}."
            )
    written = {
        f"{name}/{scalar}": value
        for name, result in results.items()
        for scalar, value in result.scalars().items()
    }
    for name, value in written.items():
        if math.isfinite(value):
            logger.log_scalar(name, value, step=step)
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if figures and callable(add_figure):
        # Imports matplotlib only here.
        from torchrl_recall.diagnostics.figures import PLOTS

        for name, result in results.items():
            plot = PLOTS.get(type(result))
            if plot is not None:
                add_figure(name, plot(result), global_step=step)
    return written

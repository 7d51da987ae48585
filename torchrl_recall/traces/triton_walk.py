"""The Triton backend: all steps of a tile of traces in one launch, on a CUDA device.

Packs the model's parameters anew at each call (two launches), so that it never walks with old ones,
then launches `walk_kernel`. Nothing waits for the device. Triton itself is imported on first use.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import NormalDelta, NormalHead, TanhNormalHead
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.eager import unsupported as eager_unsupported
from torchrl_recall.traces.layout import activation_of
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.triton_cache import exposed_cache
from torchrl_recall.traces.triton_pack import LINE, Sizes, networks, pack, sources

MAX_FEATURES, MAX_ACTIONS, MAX_WIDTH = 128, 16, 1024
DOT_PRECISIONS = {"float32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32", "float16": "ieee"}
# Tiles of a launch for each multiprocessor; with more, the scratch would outgrow the cache.
TILES_A_LAUNCH = 8


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can.

    Args:
        model (BacktrackModel): the model.

    Returns:
        str or None: the reason.
    """
    return _wrong_heads(model) or _wrong_networks(model) or _wrong_machine(model.device)


def unavailable() -> str | None:
    """Say why no model can be run, or None if some can."""
    return None if _has_triton() else "triton is not installed"


def _wrong_heads(model: BacktrackModel) -> str | None:
    if type(model.delta_head) is not NormalDelta:
        return "the observation is not continuous with a Gaussian change"
    if model.action.is_uniform:
        return "the actions are uniform"
    if type(model.action.head) not in (NormalHead, TanhNormalHead):
        return "the action is not continuous"
    if model.observation.size > MAX_FEATURES:
        return f"the observation has {model.observation.size} features, more than {MAX_FEATURES}"
    if model.action.head.size > MAX_ACTIONS:
        return f"the action has {model.action.head.size} values, more than {MAX_ACTIONS}"
    return None


def _wrong_networks(model: BacktrackModel) -> str | None:
    reason = eager_unsupported(model)
    if reason is not None:
        return reason
    widths, kinds = set(), set()
    for network in networks(model):
        layers: list[Any] = list(network)
        widths.add(tuple(linear.out_features for linear in layers[:-1:2]))
        for module in layers[1::2]:
            kind = activation_of(module)
            if kind is None:
                return f"the kernel has no activation {module}"
            kinds.add(kind)
    if len(kinds) > 1:
        return "the networks have different activations"
    widest = {width for hidden in widths for width in hidden}
    if len(widths) > 1 or len(widest) > 1:
        return "the hidden layers have different widths"
    if max(widest, default=0) > MAX_WIDTH:
        return f"the hidden layers are wider than {MAX_WIDTH}"
    for tensor in sources(model):
        if tensor.dtype != torch.float32 or tensor.device != model.device:
            return f"the model has {tensor.dtype} on {tensor.device}, not all float32 on one device"
    return None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _wrong_machine(device: torch.device) -> str | None:
    if unavailable() is not None:
        return unavailable()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the model is on {device}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return exposed_cache()


class Tiles(NamedTuple):
    """How the work is cut.

    Attributes:
        rows (int): traces of a tile.
        warps (int): warps that share it.
        stages (int): depth of the pipeline of loads.
    """

    rows: int
    warps: int
    stages: int


def choose_tiles(sizes: Sizes, num_rows: int, multiprocessors: int, shared: int) -> Tiles:
    """Choose the cut for ``num_rows`` traces on a GPU with so many bytes of shared memory a block.

    See ``bench/triton_resources.py`` for the registers and shared memory that follow.
    """
    # The smallest tile that keeps all multiprocessors busy; tensor cores take 16 rows or more.
    rows = next((n for n in (16, 32) if num_rows <= n * multiprocessors), 64)
    columns = max(sizes.columns, 2 * sizes.padded_features)
    # Large tiles need the registers of eight warps, small ones have no work for so many.
    warps = 8 if rows * columns >= 4096 else 4
    # All of a layer of 256 in flight hides most of the cache's latency.
    stage = (rows + columns) * LINE
    return Tiles(rows, warps, max(2, min(4, shared // stage)))


@torch.no_grad()
def triton_walk(
    model: BacktrackModel,
    start: Tensor,
    num_steps: int,
    *,
    seed: Tensor | None = None,
    noise: TraceNoise | None = None,
    precision: str = "float32",
) -> Columns:
    """Walk backwards from all starts.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
        start (Tensor): ``[n, size]`` float32 flat states.
        num_steps (int): length ``T`` of the traces.

    Keyword Args:
        seed (Tensor, optional): one int64 on the model's device, read there. The same seed gives
            the same traces, whatever the number of rows behind them.
        noise (TraceNoise, optional): the random numbers instead of a seed.
        precision (str): of the products' operands: ``"float32"``, ``"tf32x3"`` (on tensor cores,
            nearly as precise), ``"tf32"`` or ``"float16"``. Sums are always in float32.

    Returns:
        Columns: the traces.

    Raises:
        ValueError: neither or both of seed and noise, or an unknown precision.
    """
    from torchrl_recall.traces.triton_kernel import walk_kernel

    kernel: Any = walk_kernel
    if (seed is None) == (noise is None):
        raise ValueError("triton_walk needs either a seed or noise.")
    if precision not in DOT_PRECISIONS:
        raise ValueError(f"precision must be one of {list(DOT_PRECISIONS)}, got {precision!r}.")
    with torch.cuda.device_of(start):
        columns = Columns.empty(model, len(start), num_steps)
        weights, vectors = pack(model, precision)
        sizes = Sizes.of(model, precision)
        multiprocessors, shared = _limits(start.device)
        tiles = choose_tiles(sizes, len(start), multiprocessors, shared)
        # The scratch of this many tiles stays in the second-level cache.
        rows_a_launch = TILES_A_LAUNCH * multiprocessors * tiles.rows
        programs = -(-min(len(start), rows_a_launch) // tiles.rows)
        scratch = weights.new_empty(programs * tiles.rows * sizes.scratch)
        # Triton's interpreter cannot store bool.
        outputs = (*columns[:-1], columns.mask.view(torch.int8))
        start = start.contiguous()
        noise_columns = (None, None, None)
        if noise is not None:
            noise_columns = tuple(part if part is None else part.contiguous() for part in noise[:3])
        scalars = _scales(model) | constants(model, sizes, tiles, precision, draws=noise is None)
        for first_row in range(0, len(start), rows_a_launch):
            rows = min(len(start) - first_row, rows_a_launch)
            kernel[(-(-rows // tiles.rows),)](
                start, seed, weights, vectors, scratch, *noise_columns, *outputs,
                first_row, len(start), num_steps, **scalars, num_warps=tiles.warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    return columns


def _limits(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors, and the bytes of shared memory a block can have."""
    if device.type != "cuda":
        return 1, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _scales(model: BacktrackModel) -> dict[str, float]:
    """Return the numbers of the heads."""
    action: Any = model.action.head
    delta: Any = model.delta_head
    low, high = action.log_scale_range
    delta_low, delta_high = delta.log_scale_range
    return {
        "action_low": low,
        "action_width": high - low,
        "action_floor": 0.0 if isinstance(action, TanhNormalHead) else action.normalizer.floor,
        "delta_low": delta_low,
        "delta_width": delta_high - delta_low,
    }


def constants(
    model: BacktrackModel, sizes: Sizes, tiles: Tiles, precision: str, *, draws: bool
) -> dict[str, Any]:
    """Return what the kernel is compiled for, by its names."""
    activations: list[Any] = list(model.action_network)[1::2]
    activation = activation_of(activations[0]) if activations else ("identity", 0.0)
    assert activation is not None  # as `unsupported` made sure
    return {
        "D": sizes.features,
        "A": sizes.actions,
        "DP": sizes.padded_features,
        "AP": sizes.padded_actions,
        "KI": sizes.padded_input,
        "BI": sizes.input_inner,
        "HP": sizes.padded_width,
        "BK": sizes.inner,
        "BN": sizes.columns,
        "LAYERS": sizes.layers,
        "KIND": activation[0],
        "SLOPE": activation[1],
        "SQUASHES": isinstance(model.action.head, TanhNormalHead),
        "STOPS": sizes.stops,
        "DRAWS": draws,
        "PRECISION": DOT_PRECISIONS[precision],
        "BM": tiles.rows,
        "STAGES": tiles.stages,
    }

"""The hot path: walk a backtracking model backwards, many states at once."""

from torchrl_recall.traces.backends import BackendStatus, backends
from torchrl_recall.traces.large_columns import release_memory
from torchrl_recall.traces.noise import TraceNoise, draw_noise
from torchrl_recall.traces.sample import sample_traces

__all__ = [
    "BackendStatus",
    "TraceNoise",
    "backends",
    "draw_noise",
    "release_memory",
    "sample_traces",
]

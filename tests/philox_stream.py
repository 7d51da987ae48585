"""The kernels' random numbers, written out in NumPy: integers exactly, normals in float64."""

from __future__ import annotations

import numpy as np
import torch

from torchrl_recall.traces import TraceNoise

ACTION, DELTA, UNIFORM = range(3)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., 2011) of counters ``[..., 4]`` under a pair of words."""
    c = [np.asarray(word, dtype=np.uint64) for word in np.moveaxis(np.asarray(counter), -1, 0)]
    k = [int(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        half = np.uint64(32)
        c = [
            (second >> half) ^ c[1] ^ np.uint64(k[0]),
            second & low,
            (first >> half) ^ c[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1)


def words(seed, rows, step, head, blocks):
    """Words ``[rows, blocks, 4]``."""
    counter = np.zeros((rows, blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(rows)[:, None]
    counter[..., 1] = step
    counter[..., 2] = (head << 16) | np.arange(blocks)
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def box_muller(radius_word, angle_word):
    """Two normals from two words; the conversions to float32 are part of the stream."""
    whole = (radius_word >> np.uint64(1)).astype(np.int64).astype(np.float32)
    uniform = whole * np.float32(2.0**-31) + np.float32(2.0**-32)
    signed = angle_word.astype(np.uint32).view(np.int32).astype(np.float32)
    angle = 2 * np.pi * signed.astype(np.float64) * 2.0**-32
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    return radius * np.cos(angle), radius * np.sin(angle)


def normals(seed, rows, step, head, size):
    """Normals ``[rows, size]`` in float64."""
    x = words(seed, rows, step, head, -(-size // 4))
    numbers = [*box_muller(x[..., 0], x[..., 1]), *box_muller(x[..., 2], x[..., 3])]
    return np.stack(numbers, -1).reshape(rows, -1)[:, :size]


def uniforms(seed, rows, step, word):
    """Uniform numbers ``[rows]``."""
    x = words(seed, rows, step, UNIFORM, 1)[:, 0, word]
    return (x >> np.uint64(8)).astype(np.float64) * 2.0**-24


def trace_noise(model, seed, num_steps, rows):
    """All noise of a walk with continuous heads; the first step back is the last of the trace."""
    steps = range(num_steps - 1, -1, -1)
    heads = (ACTION, model.action.head), (DELTA, model.delta_head)
    parts = [
        [normals(seed, rows, step, which, head.noise_size) for step in steps]
        for which, head in heads
    ]
    parts.append([uniforms(seed, rows, step, 2) for step in steps])
    action, delta, stop = (torch.from_numpy(np.stack(part)).to(model.dtype) for part in parts)
    return TraceNoise(action, delta, stop if model.has_stop else None)

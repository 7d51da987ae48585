"""Ways to spoil arguments, and digests that tell whether anything was changed.

Every choice comes from a `random.Random`, so that a seed names a case.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

WRONG = (
    None,
    "x",
    "",
    b"x",
    -1,
    0,
    3,
    1.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    True,
    [],
    (),
    {},
    [None],
    ["x", 3],
    ("x", ("y",)),
    [1, 2],
    (2.0, 1.0),
    {"a": 1},
    range(3),
    object(),
    int,
    nn.Linear,
    len,
    1 + 2j,
    np.float64(0.5),
    np.int64(2),
    np.zeros(3),
    torch.tensor(2),
    torch.tensor([1.0, math.nan]),
    torch.zeros(2, 0),
    torch.zeros((), device="meta"),
    torch.float16,
    torch.int64,
    torch.device("meta"),
    torch.Generator(),
    nn.Linear(2, 2),
    TensorDict({}, [2]),
    TensorDict({"a": torch.zeros(2)}, [2]),
)
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def spoil(value, rng):
    """Return a spoilt copy of an argument (or one that only looks it)."""
    if isinstance(value, TensorDictBase) and rng.random() < 0.9:
        return spoil_tensordict(value, rng)
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return spoil_tensor(value, rng)
    return rng.choice(WRONG)


def spoil_tensordict(data, rng):
    """Spoil one entry, or the batch."""
    data = data.clone()
    way = rng.choice(["entry"] * 6 + ["drop", "empty", "extra", "meta", "float64", "mask"])
    if way == "empty":
        return data.contiguous()[:0] if data.ndim else data
    if way == "extra":
        return data.unsqueeze(rng.randrange(data.ndim + 1))
    if way == "meta":
        return data.to("meta")
    if way == "float64":
        return data.apply(lambda x: x.double() if x.is_floating_point() else x)
    if way == "mask":
        shape = rng.choice([data.shape, (*data.shape, 1), (3,), (), (*data.shape, 2)])
        mask = torch.rand(shape) if rng.random() < 0.3 else torch.rand(shape) < 0.5
        return _put(data, ("collector", "mask"), mask)
    key = rng.choice(sorted(data.keys(True, rng.random() < 0.8), key=str))
    if way == "drop":
        return data.exclude(key)
    value = data.get(key)
    if isinstance(value, TensorDictBase) or rng.random() < 0.1:
        wrong = [TensorDict({"a": torch.zeros(data.shape)}, data.shape), torch.zeros(data.shape)]
        return _put(data.exclude(key), key, rng.choice([*wrong, "x", 3]))
    return _put(data.exclude(key), key, spoil_tensor(value, rng), data.ndim)


def _put(data, key, value, ndim=0):
    """Set an entry, giving up batch dimensions that it does not have."""
    if data.is_locked:
        data = data.clone()
    for keep in range(data.ndim, -1, -1):
        try:
            out = data.clone()
            out.auto_batch_size_(keep) if keep < data.ndim else None
            return out.set(key, value)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return data


def spoil_tensor(value, rng):
    """Change shape, dtype, device or numbers of a tensor."""
    way = rng.choice(
        ["shape", "shape", "dtype", "dtype", "nan", "huge", "meta", "negative", "view"]
    )
    if way == "shape":
        changes = [
            lambda x: x.unsqueeze(-1),
            lambda x: x.unsqueeze(0),
            lambda x: x.repeat(*[1] * (x.ndim - 1), 2) if x.ndim else x.repeat(2),
            lambda x: x[..., :0] if x.ndim else x,
            lambda x: x[..., 0] if x.ndim and x.shape[-1] else x,
            lambda x: x.flatten(),
            lambda x: x.sum(),
            lambda x: x.transpose(0, -1) if x.ndim > 1 else x,
        ]
        return rng.choice(changes)(value)
    if way == "dtype":
        return value.to(rng.choice(DTYPES))
    if way == "meta":
        return value.to("meta")
    value = value.clone()
    if way == "view":
        wide = torch.stack([value, value], -1)
        return rng.choice(
            [wide[..., 0], value.requires_grad_() if value.is_floating_point() else value]
        )
    if value.numel() and value.device.type != "meta":
        where = rng.randrange(value.numel()) if rng.random() < 0.7 else slice(None)
        flat = value.view(-1) if value.is_contiguous() else value.reshape(-1)
        if value.is_floating_point():
            extreme = torch.finfo(value.dtype).max
            numbers = {"nan": [math.nan, math.inf, -math.inf], "huge": [extreme, -extreme, 1e30]}
            flat[where] = min(rng.choice(numbers.get(way, [-1.0, -0.0, 7.0])), extreme)
        elif value.dtype != torch.bool:
            info = torch.iinfo(value.dtype)
            flat[where] = rng.choice(
                {"huge": [info.max, info.min]}.get(way, [-1 if info.min else 1, 99])
            )
        return flat.reshape(value.shape)
    return value


def digest(*things):
    """A checksum of all tensors in things: TensorDicts, modules, storages, samplers, numbers."""
    total = hashlib.sha1()
    _add(total, things)
    return total.hexdigest()


def _add(total, thing):
    if isinstance(thing, TensorDictBase):
        for key in sorted(thing.keys(True, True), key=str):
            total.update(str(key).encode())
            _add(total, thing.get(key))
        total.update(str(thing.batch_size).encode())
    elif isinstance(thing, torch.Tensor):
        total.update(f"{thing.dtype}{tuple(thing.shape)}{thing.device.type}".encode())
        if thing.device.type == "cpu":
            numbers = torch.empty(thing.numel(), dtype=thing.dtype)
            numbers.copy_(thing.detach().reshape(-1))
            total.update(numbers.view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, nn.Module):
        _add(total, thing.state_dict())
    elif isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            total.update(str(key).encode())
            _add(total, thing[key])
    elif isinstance(thing, list | tuple):
        for part in thing:
            _add(total, part)
    else:
        total.update(f"{type(thing).__name__}".encode())
        if isinstance(thing, int | float | str | bool):
            total.update(str(thing).encode())

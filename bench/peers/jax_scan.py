"""JAX: the whole walk as one `jit(lax.scan)`, with a copy of the weights. CPU only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.peers.plain import Noise, Walked
from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel
from torchrl_recall.model.heads import (
    LOG_SQRT_2_PI,
    TANH_LIMIT,
    NormalDelta,
    SupportDelta,
    TanhNormalHead,
)

# JAX's default; "rbg" and "unsafe_rbg" are not faster on the CPU.
GENERATOR = "threefry2x32"
# Up to this many random numbers are drawn before the walk, which is then the faster way.
DRAWN_BEFORE = 2**22
Parameters = list[list[tuple[Any, Any]]]


class JaxWalk(NamedTuple):
    """The compiled walk.

    Attributes:
        sample (Callable): from a call's number to a `Walked` of JAX arrays ``[T, B, ...]``, newest
            step first.
        on_noise (Callable): the same from the noise of both heads, ``[T, B, ...]``, for tests.
    """

    sample: Callable[[int], Walked]
    on_noise: Callable[[Noise], Walked]


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], Walked]:
    """Return a function that walks back in JAX; the first call compiles.

    Args:
        model (BacktrackModel): whose weights to copy.
        start (Tensor): ``[B, size]`` states on the CPU.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a `Walked` of JAX arrays, ready. In its favour: step first (never
        transposed), JAX's fastest generator, compile time left out, the starts are JAX's already.

    Raises:
        Unavailable: JAX is not installed, or not a CPU case.
    """
    compiled = jax_walk(model, start, num_steps)
    count = itertools.count()

    def walk() -> Walked:
        out = compiled.sample(next(count))
        out.delta_log_prob.block_until_ready()  # pyright: ignore[reportAttributeAccessIssue]
        return out

    walk()
    return walk


def jax_walk(
    model: BacktrackModel, start: Tensor, num_steps: int, generator: str = GENERATOR
) -> JaxWalk:
    """Compile the walk.

    Args:
        model (BacktrackModel): whose weights to copy.
        start (Tensor): ``[B, size]`` states on the CPU.
        num_steps (int): length of the walk.
        generator (str): one of JAX's generators.

    Returns:
        JaxWalk: the walk on new and on given noise.
    """
    if start.device.type != "cpu":
        raise Unavailable("timed on the CPU only")
    jax = _jax()
    # A thread of its own for each call costs as much as a short walk.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    step = (_gaussian if isinstance(model.delta_head, NormalDelta) else _categorical)(model)
    action_head, delta_head = model.action.head, model.delta_head
    assert action_head.noise_kind == delta_head.noise_kind
    draw = jax.random.normal if action_head.noise_kind == "normal" else jax.random.uniform
    shape = len(start), action_head.noise_size + delta_head.noise_size
    networks = [_copy(model.action_network), _copy(model.delta_network)]
    first = jax.numpy.asarray(start.numpy())
    base = jax.random.key(0, impl=generator)

    @jax.jit
    def sample(networks: Parameters, first: Any, base: Any, count: int) -> Walked:
        key = jax.random.fold_in(base, count)
        if num_steps * math.prod(shape) <= DRAWN_BEFORE:
            return scan(networks, first, draw(key, (num_steps, *shape)))

        def go(state: Any, key: Any) -> tuple[Any, Walked]:
            walked = step(networks, state, draw(key, shape))
            return walked.observation, walked

        return jax.lax.scan(go, first, jax.random.split(key, num_steps))[1]

    @jax.jit
    def scan(networks: Parameters, first: Any, noise: Any) -> Walked:
        def go(state: Any, noise: Any) -> tuple[Any, Walked]:
            walked = step(networks, state, noise)
            return walked.observation, walked

        return jax.lax.scan(go, first, noise)[1]

    return JaxWalk(
        lambda count: sample(networks, first, base, count),
        lambda noise: scan(networks, first, jax.numpy.asarray(torch.cat(noise, -1).numpy())),
    )


def _jax() -> Any:
    try:
        return import_module("jax")
    except ImportError as error:
        raise Unavailable(f"JAX is not installed ({error})") from None


def _copy(network: nn.Module) -> list[tuple[Any, Any]]:
    """Return weight (transposed) and bias of each linear layer."""
    jnp = _jax().numpy

    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    return [
        (jnp.array(m.weight.detach().t().numpy()), jnp.array(m.bias.detach().numpy()))
        for m in layers
    ]


def _run(layers: list[tuple[Any, Any]], x: Any) -> Any:
    """Run a network whose first layer's sums are ``x``, without its own bias."""
    jax = _jax()
    x = x + layers[0][1]
    for weight, bias in layers[1:]:
        x = jax.nn.relu(x) @ weight + bias
    return x


def _gaussian(model: BacktrackModel) -> Callable[..., Walked]:
    jax = _jax()
    jnp = jax.numpy

    action_head, delta_head = model.action.head, model.delta_head
    assert isinstance(action_head, TanhNormalHead)
    assert isinstance(delta_head, NormalDelta)
    split_at, action_range = action_head.size, action_head.log_scale_range
    delta_range = delta_head.log_scale_range

    def split(parameters: Any, interval: tuple[float, float]) -> tuple[Any, Any]:
        loc, raw = jnp.split(parameters, 2, -1)
        return loc, interval[0] + (interval[1] - interval[0]) * jax.nn.sigmoid(raw)

    def normal_log_prob(noise: Any, log_scale: Any) -> Any:
        return -(0.5 * noise * noise + log_scale + LOG_SQRT_2_PI).sum(-1)

    def step(networks: Parameters, state: Any, noise: Any) -> Walked:
        action_layers, delta_layers = networks
        action_noise, delta_noise = noise[:, :split_at], noise[:, split_at:]
        loc, log_scale = split(_run(action_layers, state @ action_layers[0][0]), action_range)
        pre = jnp.clip(loc + jnp.exp(log_scale) * action_noise, -TANH_LIMIT, TANH_LIMIT)
        action = jnp.tanh(pre)
        squeeze = 2 * (math.log(2) - pre - jax.nn.softplus(-2 * pre))
        action_log_prob = normal_log_prob(action_noise, log_scale) - squeeze.sum(-1)
        features = jnp.concatenate([state, action], -1)
        loc, log_scale = split(_run(delta_layers, features @ delta_layers[0][0]), delta_range)
        before = state + loc + jnp.exp(log_scale) * delta_noise
        return Walked(before, action, action_log_prob, normal_log_prob(delta_noise, log_scale))

    return step


def _categorical(model: BacktrackModel) -> Callable[..., Walked]:
    """Discrete states and actions: rows of the first layers looked up instead of one-hot sums."""
    jax = _jax()
    jnp = jax.numpy

    codec, head = model.observation, model.delta_head
    assert isinstance(head, SupportDelta)
    assert not head.has_dead_ends  # states that nothing leads to are left out
    offsets, support = codec.offsets.tolist(), jnp.asarray(head.support.numpy())
    low, high = jnp.asarray(head.low.numpy()), jnp.asarray(head.high.numpy())

    def draw(logits: Any, uniform: Any) -> tuple[Any, Any]:
        cumulative = jnp.cumsum(jax.nn.softmax(logits), -1)
        index = (cumulative <= uniform * cumulative[:, -1:] * (1 - 2**-23)).sum(-1)
        log_prob = jax.nn.log_softmax(logits)
        return index, jnp.take_along_axis(log_prob, index[:, None], -1)[:, 0]

    def feature_indices(state: Any) -> list[Any]:
        columns = [state[:, i] for i in range(codec.size)]
        if codec.has_joint_code:
            joint = columns[0]
            for n, column in zip(codec.cardinality[1:], columns[1:], strict=True):
                joint = joint * n + column
            columns.append(joint)
        return [column + offset for column, offset in zip(columns, offsets, strict=True)]

    def step(networks: Parameters, state: Any, noise: Any) -> Walked:
        action_layers, delta_layers = networks
        features = feature_indices(state)
        weight = action_layers[0][0]
        sums = sum(weight[i] for i in features)
        action, action_log_prob = draw(_run(action_layers, sums), noise[:, :1])
        weight = delta_layers[0][0]
        sums = sum(weight[i] for i in [*features, codec.feature_size + action])
        reached = state[:, None] + support
        inside = ((reached >= low) & (reached <= high)).all(-1)
        change, delta_log_prob = draw(
            jnp.where(inside, _run(delta_layers, sums), -jnp.inf), noise[:, 1:]
        )
        return Walked(state + support[change], action, action_log_prob, delta_log_prob)

    return step

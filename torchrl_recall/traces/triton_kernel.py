"""The Triton kernels of the trace sampler: pack the parameters, walk a tile of traces.

One program of `walk_kernel` takes a tile of traces through all steps. The inputs and hidden units
of a tile pass from layer to layer through a scratch in global memory, which stays in the second-
level cache: Triton cannot slice a tensor along the inner dimension of a product, and products that
feed each other in registers get a layout in which warps repeat each other's work.

Imported by ``triton_walk.py``, and only where Triton is installed.
"""
# Triton compiles these functions: values of other types, from a package that may be missing.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

LOG_SQRT_2_PI = tl.constexpr(0.9189385332046727)
LOG_2 = tl.constexpr(0.6931471805599453)
# atanh(1 - 1e-6), as in heads.py.
TANH_LIMIT = tl.constexpr(7.254328619027709)
# The third word of a counter says which head the numbers are for.
ACTION_STREAM = tl.constexpr(0)
DELTA_STREAM = tl.constexpr(1)
UNIFORM_STREAM = tl.constexpr(2)


@triton.jit
def pack_kernel(
    source, index, kind, weights, vectors, num_weights, size, state_floor, delta_floor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gather parameters and statistics into the padded layout that `walk_kernel` reads."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(source + tl.load(index + offsets, inside, 0), inside, 0.0)
    is_weight = offsets < num_weights
    tl.store(weights + offsets, value.to(weights.dtype.element_ty), inside & is_weight)
    offsets -= num_weights
    is_vector = inside & ~is_weight
    what = tl.load(kind + offsets, is_vector, 0)
    spread = tl.sqrt(tl.where(what > 0, value, 1.0))
    delta_scale = tl.maximum(spread, delta_floor, propagate_nan=tl.PropagateNan.ALL)
    state_scale = tl.maximum(spread, state_floor, propagate_nan=tl.PropagateNan.ALL)
    value = tl.where(what == 1, 1 / state_scale, value)
    value = tl.where(what == 2, delta_scale, value)
    value = tl.where(what == 3, tl.log(delta_scale), value)
    tl.store(vectors + offsets, value, is_vector)


@triton.jit
def philox(seed, rows, step, head, block):
    """Four words of Philox4x32-10 for a trace, a step and a block of a head."""
    rows, block = tl.broadcast(rows, block)
    zero = (rows * 0).to(tl.uint32)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    third = (block + head * 65536).to(tl.uint32)
    return tl.philox_impl(
        rows.to(tl.uint32), (rows * 0 + step).to(tl.uint32), third, zero, low, high
    )


@triton.jit
def turn(angle):
    """Cosine and sine of an angle in [-1/2, 1/2] turns (Cephes' polynomials)."""
    quarter = tl.floor(angle * 4 + 0.5)
    x = (angle - quarter * 0.25) * 6.283185307179586
    square = x * x
    sine = square * (square * -1.9515295891e-4 + 8.3321608736e-3) - 1.6666654611e-1
    sine = x * square * sine + x
    cosine = square * (square * 2.4433157117e-5 - 1.3887316255e-3) + 4.1666645683e-2
    cosine = square * square * cosine - 0.5 * square + 1
    quarter = quarter.to(tl.int32)
    swapped = (quarter & 1) != 0
    out_cosine = tl.where(swapped, sine, cosine)
    out_sine = tl.where(swapped, cosine, sine)
    out_cosine = tl.where(((quarter + 1) & 2) != 0, -out_cosine, out_cosine)
    return out_cosine, tl.where((quarter & 2) != 0, -out_sine, out_sine)


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normal numbers from two words."""
    uniform = (radius_bits >> 1).to(tl.int32).to(tl.float32) * 2.0**-31 + 2.0**-32
    radius = tl.sqrt(-2 * tl.log(uniform))
    angle = angle_bits.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    cosine, sine = turn(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, rows, step, head, SIZE: tl.constexpr):
    """Normal numbers ``[rows, SIZE]``; a block of Philox serves four features."""
    block = tl.arange(0, SIZE // 4)[None, :]
    x0, x1, x2, x3 = philox(seed, rows[:, None], step, head, block)
    z0, z1 = box_muller(x0, x1)
    z2, z3 = box_muller(x2, x3)
    pairs = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(pairs, (rows.shape[0], SIZE))


@triton.jit
def stop_uniform(seed, rows, step):
    """Uniform numbers ``[rows]`` in [0, 1)."""
    _, _, bits, _ = philox(seed, rows, step, UNIFORM_STREAM, rows * 0)
    return (bits >> 8).to(tl.int32).to(tl.float32) * 2.0**-24


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to the last bits of 1."""
    t = tl.exp(-2 * tl.abs(x))
    value = (1 - t) / (1 + t)
    return tl.where(x < 0, -value, value)


@triton.jit
def activate(x, KIND: tl.constexpr, SLOPE: tl.constexpr):
    """The activation; NaN stays NaN, so that the walk can see it."""
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    negative = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "identity":
        y = x
    elif KIND == "relu":
        y = positive
    elif KIND == "leaky_relu":
        y = positive + SLOPE * negative
    elif KIND == "elu":
        y = positive + SLOPE * (tl.exp(negative) - 1)
    elif KIND == "tanh":
        y = tanh(x)
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = positive + tl.log(1 + tl.exp(negative - positive))
        if KIND == "mish":
            y = x * tanh(y)
        else:
            tl.static_assert(KIND == "softplus")
    return y


@triton.jit
def product(source, weight, low, K: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
            BM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows ``[BM, K]`` of the scratch times ``N`` rows of a weight, from ``low`` on."""
    rows, inner, units = tl.arange(0, BM), tl.arange(0, BK), low + tl.arange(0, N)
    z = tl.zeros((BM, N), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        left = tl.load(source + rows[:, None] * K + (k + inner)[None, :])
        right = tl.load(weight + units[None, :] * K + (k + inner)[:, None])
        z = tl.dot(left, right, z, input_precision=PRECISION)
    return z


@triton.jit
def hidden_layer(source, target, weight, bias, K: tl.constexpr, BK: tl.constexpr,
                 HP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr,
                 BM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One hidden layer of the tile, from scratch to scratch."""
    rows = tl.arange(0, BM)
    for low in tl.range(0, HP, BN, num_stages=1):
        units = low + tl.arange(0, BN)
        z = product(source, weight, low, K, BK, BN, BM, STAGES, PRECISION)
        h = activate(z + tl.load(bias + units)[None, :], KIND, SLOPE)
        at = target + rows[:, None] * HP + units[None, :]
        tl.store(at, h.to(target.dtype.element_ty))
    # The next layer's loads cross threads.
    tl.debug_barrier()


@triton.jit
def network(scratch, weight, bias, N: tl.constexpr, KI: tl.constexpr, BI: tl.constexpr,
            HP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, LAYERS: tl.constexpr,
            KIND: tl.constexpr, SLOPE: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Outputs ``[BM, N]`` of a network whose input is in the scratch."""
    even = scratch + BM * KI
    odd = even + BM * HP
    if LAYERS == 0:
        z = product(scratch, weight, 0, KI, BI, N, BM, STAGES, PRECISION)
    else:
        hidden_layer(
            scratch, even, weight, bias, KI, BI, HP, BN, KIND, SLOPE, BM, STAGES, PRECISION
        )
        weight += HP * KI
        for _ in tl.static_range(LAYERS - 1):
            bias += HP
            hidden_layer(
                even, odd, weight, bias, HP, BK, HP, BN, KIND, SLOPE, BM, STAGES, PRECISION
            )
            even, odd = odd, even
            weight += HP * HP
        bias += HP
        z = product(even, weight, 0, HP, BK, N, BM, STAGES, PRECISION)
    # What was read here may be overwritten from now on.
    tl.debug_barrier()
    return z + tl.load(bias + tl.arange(0, N))[None, :]


@triton.jit
def pairs(z, BM: tl.constexpr, SIZE: tl.constexpr):
    """Location and raw scale, each ``[BM, SIZE]``; they are packed in turns."""
    return tl.split(tl.reshape(z, (BM, SIZE, 2)))


@triton.jit
def sample_action(z, noise, low, width, BM: tl.constexpr, AP: tl.constexpr,
                  SQUASHES: tl.constexpr):  # fmt: skip
    """The action in the delta network's unit, and the terms of its negative log-density."""
    loc, raw = pairs(z, BM, AP)
    log_scale = low + width * tl.sigmoid(raw)
    scale = tl.exp(log_scale)
    value = loc + scale * noise
    if SQUASHES:
        inside = tl.where(value > TANH_LIMIT, TANH_LIMIT, value)
        inside = tl.where(value < -TANH_LIMIT, -TANH_LIMIT, inside)
        # The noise that would have led to the clamped value.
        noise = tl.where(inside == value, noise, (inside - loc) / scale)
        size = tl.abs(inside)
        log_scale += 2 * (LOG_2 - size - tl.log(1 + tl.exp(-2 * size)))
        value = tanh(inside)
    return value, 0.5 * noise * noise + log_scale


@triton.jit
def all_finite(x):
    """Whether each row is finite, ``[rows]``."""
    return tl.sum((tl.abs(x) < float("inf")).to(tl.int32), 1) == x.shape[1]


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_steps"])
def walk_kernel(
    start, seed, weights, vectors, scratch, noise_action, noise_delta, noise_stop,
    out_state, out_next_state, out_action, out_action_log_prob, out_delta_log_prob, out_mask,
    first_row, num_rows, num_steps, action_low, action_width, action_floor, delta_low, delta_width,
    D: tl.constexpr, A: tl.constexpr, DP: tl.constexpr, AP: tl.constexpr,
    KI: tl.constexpr, BI: tl.constexpr, HP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    LAYERS: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr, SQUASHES: tl.constexpr,
    STOPS: tl.constexpr, DRAWS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk ``BM`` traces backwards through all steps.

    The tensors are those of `Columns` and `TraceNoise`; ``start`` is ``[num_rows, D]``, ``seed``
    one int64, ``weights`` and ``vectors`` come from `pack`. The launch begins at ``first_row``.
    Sizes: ``D`` features and ``A`` actions, padded ``DP`` and ``AP``; networks of ``LAYERS`` hidden
    layers of ``HP`` units, whose input of ``KI`` numbers is read ``BI`` at a time; hidden products
    take ``BK`` units at a time and give ``BN``.
    """
    dtype: tl.constexpr = weights.dtype.element_ty
    if LAYERS == 0:
        rest: tl.constexpr = KI
        hidden: tl.constexpr = 0
    else:
        rest: tl.constexpr = HP
        hidden: tl.constexpr = HP * (KI + (LAYERS - 1) * HP)
    delta_weights = weights + (hidden + 2 * AP * rest)
    stop_weights = delta_weights + (hidden + 2 * DP * rest)
    delta_biases = vectors + (LAYERS * HP + 2 * AP)
    stop_biases = delta_biases + (LAYERS * HP + 2 * DP)
    statistics = stop_biases
    if STOPS:
        statistics += LAYERS * HP + 16
    features, actions = tl.arange(0, DP), tl.arange(0, AP)
    is_feature, is_action = features[None, :] < D, actions[None, :] < A
    scratch += tl.program_id(0).to(tl.int64) * (BM * (KI + 2 * HP))
    input_at = scratch + tl.arange(0, BM)[:, None] * KI
    if DRAWS:
        seed = tl.load(seed)

    rows = first_row + tl.program_id(0) * BM + tl.arange(0, BM)
    row_exists = rows < num_rows
    keep_state, keep_action = row_exists[:, None] & is_feature, row_exists[:, None] & is_action
    # Offsets of a large batch do not fit into 32 bits.
    long_rows = rows.to(tl.int64)
    for column in tl.static_range(0, KI, BI):
        tl.store(input_at + (column + tl.arange(0, BI))[None, :], tl.zeros((BM, BI), dtype))
    tl.debug_barrier()
    start_at = start + long_rows[:, None] * D + features[None, :]
    state = tl.load(start_at, keep_state, 0.0)
    last = (long_rows * num_steps + (num_steps - 1))[:, None] * D + features[None, :]
    tl.store(out_next_state + last, state, keep_state)
    alive = row_exists
    finite = rows >= 0
    for step in tl.range(0, num_steps, num_stages=1):
        t = num_steps - 1 - step
        noise_row = t.to(tl.int64) * num_rows + long_rows
        scaled = state - tl.load(statistics + features)[None, :]
        scaled *= tl.load(statistics + DP + features)[None, :]
        tl.store(input_at + features[None, :], scaled.to(dtype), is_feature)
        tl.debug_barrier()
        if STOPS:
            z = network(scratch, stop_weights, stop_biases, 16, KI, BI, HP, BK, BN, LAYERS,
                        KIND, SLOPE, BM, STAGES, PRECISION)  # fmt: skip
            logit = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, z, 0.0), 1)
            if DRAWS:
                uniform = stop_uniform(seed, rows, step)
            else:
                uniform = tl.load(noise_stop + noise_row, row_exists, 0.0)
            alive = alive & (uniform >= tl.sigmoid(logit))

        z = network(scratch, weights, vectors, 2 * AP, KI, BI, HP, BK, BN, LAYERS, KIND, SLOPE,
                    BM, STAGES, PRECISION)  # fmt: skip
        if DRAWS:
            noise = normals(seed, rows, step, ACTION_STREAM, AP)
        else:
            noise_at = noise_action + noise_row[:, None] * A + actions[None, :]
            noise = tl.load(noise_at, keep_action, 0.0)
        middle = tl.load(statistics + 5 * DP + actions)[None, :]
        unit = tl.load(statistics + 5 * DP + AP + actions)[None, :]
        if not SQUASHES:
            unit = tl.maximum(tl.sqrt(unit), action_floor, propagate_nan=tl.PropagateNan.ALL)
        value, energy = sample_action(z, noise, action_low, action_width, BM, AP, SQUASHES)
        tl.store(input_at + D + actions[None, :], value.to(dtype), is_action)
        tl.debug_barrier()
        action = middle + unit * value
        energy = tl.where(is_action, energy + tl.log(unit), 0.0)
        action_log_prob = -A * LOG_SQRT_2_PI - tl.sum(energy, 1)

        z = network(scratch, delta_weights, delta_biases, 2 * DP, KI, BI, HP, BK, BN, LAYERS,
                    KIND, SLOPE, BM, STAGES, PRECISION)  # fmt: skip
        if DRAWS:
            noise = tl.where(is_feature, normals(seed, rows, step, DELTA_STREAM, DP), 0.0)
        else:
            noise_at = noise_delta + noise_row[:, None] * D + features[None, :]
            noise = tl.load(noise_at, keep_state, 0.0)
        loc, raw = pairs(z, BM, DP)
        log_scale = delta_low + delta_width * tl.sigmoid(raw)
        log_scale += tl.load(statistics + 3 * DP + features)[None, :]
        state += tl.load(statistics + 2 * DP + features)[None, :] * loc
        state += tl.load(statistics + 4 * DP + features)[None, :] + tl.exp(log_scale) * noise
        energy = tl.where(is_feature, 0.5 * noise * noise + log_scale, 0.0)
        delta_log_prob = -D * LOG_SQRT_2_PI - tl.sum(energy, 1)

        finite = finite & all_finite(state) & all_finite(action)
        finite = finite & (tl.abs(action_log_prob) < float("inf"))
        finite = finite & (tl.abs(delta_log_prob) < float("inf"))
        # Computed anew at each step: hoisted out of the loop, offsets would fill registers.
        at = long_rows * num_steps + t
        state_at = at[:, None] * D + features[None, :]
        start_at = out_next_state + state_at + step * D
        state = tl.load(start_at, keep_state & ~finite[:, None], state)
        action = tl.where(finite[:, None], action, 0.0)
        action_log_prob = tl.where(finite, action_log_prob, 0.0)
        delta_log_prob = tl.where(finite, delta_log_prob, 0.0)
        tl.store(out_state + state_at, state, keep_state)
        is_older = at > long_rows * num_steps
        tl.store(out_next_state + state_at - D, state, keep_state & is_older[:, None])
        tl.store(out_action + at[:, None] * A + actions[None, :], action, keep_action)
        tl.store(out_action_log_prob + at, action_log_prob, row_exists)
        tl.store(out_delta_log_prob + at, delta_log_prob, row_exists)
        tl.store(out_mask + at, (alive & finite).to(tl.int8), row_exists)

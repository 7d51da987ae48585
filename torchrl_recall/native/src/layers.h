/* Linear layers of a tile: features by traces, so that traces are the lanes of vectors.
 *
 * Every trace's sum starts at the bias and takes the inputs in order, whatever the block's shape:
 * results depend neither on the tile nor on the number of traces in it.
 */
#ifndef RECALL_LAYERS_H
#define RECALL_LAYERS_H

#include "functions.h"
#include "packed.h"

/* Vectors of lanes in a register block: with ROWS of them the accumulators fill the registers. */
#define VECTORS (RECALL_ISA == 512 ? 4 : 2)

INLINE vf activate(int64_t kind, float slope, vf x) {
    switch (kind) {
        case RELU: return v_max(v_set(0.0f), x);
        case LEAKY_RELU: return v_select(v_lt(x, v_set(0.0f)), v_mul(x, v_set(slope)), x);
        case ELU: {
            /* expm1 by its sinh: 2 sinh(x / 2) exp(x / 2), near 0 by a cubic. */
            vf far = v_sub(v_exp(x), v_set(1.0f));
            vf near = v_set(1.0f / 120);
            near = v_fma(near, x, v_set(1.0f / 24));
            near = v_fma(near, x, v_set(1.0f / 6));
            near = v_fma(near, x, v_set(0.5f));
            near = v_fma(v_mul(near, x), x, x);
            vf below = v_select(v_lt(x, v_set(-0.1f)), far, near);
            return v_select(v_lt(x, v_set(0.0f)), v_mul(below, v_set(slope)), x);
        }
        case TANH: return v_tanh(x);
        case SIGMOID: return v_sigmoid(x);
        case SILU: return v_mul(x, v_sigmoid(x));
        case GELU: {
            vf half = v_mul(x, v_set(0.5f));
            return v_fma(half, v_erf(v_mul(x, v_set(0.70710678f))), half);
        }
        case GELU_TANH: {
            vf cube = v_mul(v_mul(x, x), x);
            vf inner = v_mul(v_fma(cube, v_set(0.044715f), x), v_set(0.79788456f));
            vf half = v_mul(x, v_set(0.5f));
            return v_fma(half, v_tanh(inner), half);
        }
        case SOFTPLUS: return v_softplus(x);
        case MISH: return v_mul(x, v_tanh(v_softplus(x)));
        default: return x;
    }
}

/* Inputs (or pairs of them) summed before their sum joins the total: rounding errors grow with the
 * length of a chain of additions. */
#ifndef PART
#define PART 64
#endif

/* Out of line: there are many register blocks, and these functions are long. */
NOINLINE void activate_rows(int64_t kind, float slope, float row[][VECTORS * LANES], int rows,
                          int vectors) {
    for (int r = 0; r < rows; r++) {
        for (float *at = row[r]; at < row[r] + vectors * LANES; at += LANES)
            v_store(at, activate(kind, slope, v_load(at)));
    }
}

#if RECALL_BFLOAT16
/* Two rows as words of bfloat16, rounded to nearest even: `even` in the lower halves. */
INLINE vi to_pairs(vf even, vf odd) {
    vi low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    vi high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return vi_or(low, vi_shift_left(high, 16));
}
typedef uint32_t operand;
INLINE const operand *operands(const packed_layer *layer) { return layer->weight_pairs; }
INLINE int64_t depth(const packed_layer *layer) { return (layer->inputs + 1) / 2; }
#define LOAD(p) vi_load(p)
#define SET(x) vi_set(x)
#define MULTIPLY_ADD(a, b, c) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
typedef vi operands_v;
#else
typedef float operand;
INLINE const operand *operands(const packed_layer *layer) { return layer->weight; }
INLINE int64_t depth(const packed_layer *layer) { return layer->inputs; }
#define LOAD(p) v_load(p)
#define SET(x) v_set(x)
#define MULTIPLY_ADD(a, b, c) v_fma(a, b, c)
typedef vf operands_v;
#endif

/* sum[r] += sum over k of weight[k][r] in[k]. */
INLINE void accumulate(const int rows, const int vectors, vf sum[][VECTORS], const operand *weight,
                       int64_t n, const operand *in) {
    for (int64_t k = 0; k < n; k++, weight += rows, in += TILE) {
        operands_v x[VECTORS];
        UNROLLED for (int v = 0; v < vectors; v++) x[v] = LOAD(in + v * LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            operands_v w = SET(weight[r]);
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[r][v] = MULTIPLY_ADD(w, x[v], sum[r][v]);
        }
    }
}

/* out[r] = activation of base[r] (if there is a base, else bias[r]) + sum of weight[k][r] in[k] over
 * k, for `rows` outputs and `vectors` vectors of lanes, which are constants where this is called. */
INLINE void register_block(const int rows, const int vectors, const int is_long,
                           const operand *weight, int64_t n, const operand *in, const float *bias, const float *base, float *out,
                           int64_t kind, float slope, int is_last) {
    vf sum[ROWS][VECTORS];
    UNROLLED for (int r = 0; r < rows; r++) {
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[r][v] = base ? v_load(base + r * TILE + v * LANES) : v_set(bias[r]);
    }
    accumulate(rows, vectors, sum, weight, is_long ? PART : n, in);
    for (n -= PART; is_long && n > 0; n -= PART) {
        float total[ROWS][VECTORS * LANES];
        weight += PART * rows;
        in += PART * TILE;
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < vectors; v++) {
                v_store(total[r] + v * LANES, sum[r][v]);
                sum[r][v] = v_set(0.0f);
            }
        }
        accumulate(rows, vectors, sum, weight, n < PART ? n : PART, in);
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[r][v] = v_add(sum[r][v], v_load(total[r] + v * LANES));
        }
    }
    if (kind == RELU) {
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = v_max(v_set(0.0f), sum[r][v]);
        }
    } else if (kind != IDENTITY) {
        float row[ROWS][VECTORS * LANES];
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < vectors; v++) v_store(row[r] + v * LANES, sum[r][v]);
        }
        activate_rows(kind, slope, row, rows, vectors);
        UNROLLED for (int r = 0; r < rows; r++) {
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = v_load(row[r] + v * LANES);
        }
    }
#if RECALL_BFLOAT16
    if (!is_last) {
        UNROLLED for (int r = 0; r < rows; r += 2) {
            UNROLLED for (int v = 0; v < vectors; v++)
                vi_store(out + r / 2 * TILE + v * LANES,
                         to_pairs(sum[r][v], r + 1 < rows ? sum[r + 1][v] : v_set(0.0f)));
        }
        return;
    }
#else
    (void)is_last;
#endif
    UNROLLED for (int r = 0; r < rows; r++) {
        UNROLLED for (int v = 0; v < vectors; v++) v_store(out + r * TILE + v * LANES, sum[r][v]);
    }
}

/* Outputs of which one row of the tile holds: of operands in pairs two. */
INLINE int64_t row_share(int is_last) { return RECALL_BFLOAT16 && !is_last ? 2 : 1; }

/* `blocks` register blocks, of which the first begins at these places. */
typedef void (*block_function)(int64_t blocks, const operand *, int64_t, const operand *,
                               const float *, const float *, float *, int64_t, float, int);
#define BLOCK_OF(r, v)                                                                            \
    BLOCK_FUNCTION(block_##r##_##v, r, v, 0)                                                      \
    BLOCK_FUNCTION(block_##r##_##v##_long, r, v, 1)
#define BLOCK_FUNCTION(name, r, v, is_long)                                                       \
    static void name(int64_t blocks, const operand *weight, int64_t n, const operand *in,         \
                     const float *bias, const float *base, float *out, int64_t kind,              \
                     float slope, int is_last) {                                                  \
        for (; blocks; blocks--, weight += n * r, bias += r) {                                    \
            register_block(r, v, is_long, weight, n, in, bias, base, out, kind, slope, is_last);  \
            if (base) base += r * TILE;                                                           \
            out += r / row_share(is_last) * TILE;                                                 \
        }                                                                                         \
    }
#define BLOCKS_OF(v)                                                                              \
    BLOCK_OF(1, v) BLOCK_OF(2, v) BLOCK_OF(3, v) BLOCK_OF(4, v) BLOCK_OF(5, v) BLOCK_OF(6, v)
#define ENTRIES_OF(v, kind)                                                                       \
    {block_1_##v##kind, block_2_##v##kind, block_3_##v##kind,                                     \
     block_4_##v##kind, block_5_##v##kind, block_6_##v##kind}
#if RECALL_ISA == 512
BLOCKS_OF(1) BLOCKS_OF(2) BLOCKS_OF(3) BLOCKS_OF(4)
#define ENTRIES(kind)                                                                             \
    {ENTRIES_OF(1, kind), ENTRIES_OF(2, kind), ENTRIES_OF(3, kind), ENTRIES_OF(4, kind)}
#else
BLOCKS_OF(1) BLOCKS_OF(2)
#define ENTRIES(kind) {ENTRIES_OF(1, kind), ENTRIES_OF(2, kind)}
#endif
/* By: longer than PART, vectors - 1, rows - 1. */
static const block_function BLOCKS[2][VECTORS][ROWS] = {ENTRIES(), ENTRIES(_long)};

/* The dense part of a layer for the first `lanes` traces of a tile (a multiple of LANES). A layer
 * that is not the last one is activated, and written as operands of the next. `base` holds the bias
 * and the share of one-hot inputs, if there are any. */
static void dense(const packed_network *network, const packed_layer *layer, int is_last,
                  const operand *in, const float *base, float *out, int lanes) {
    int64_t kind = is_last ? IDENTITY : network->activation, n = depth(layer);
    const operand *weight = operands(layer);
    for (int64_t j = 0; j < layer->outputs;) {
        int64_t rows = layer->outputs - j < ROWS ? layer->outputs - j : ROWS;
        /* Weights are read once for all lanes; where one block takes all, so do many in a row. */
        int64_t blocks = lanes <= VECTORS * LANES ? (layer->outputs - j) / rows : 1;
        for (int lane = 0; lane < lanes;) {
            int vectors = (lanes - lane) / LANES;
            if (vectors > VECTORS) vectors = VECTORS;
            BLOCKS[n > PART][vectors - 1][rows - 1](
                blocks, weight, n, in + lane, layer->bias + j, base ? base + j * TILE + lane : NULL,
                out + j / row_share(is_last) * TILE + lane, kind, network->slope, is_last);
            lane += vectors * LANES;
        }
        weight += n * rows * blocks;
        j += rows * blocks;
    }
}

#endif

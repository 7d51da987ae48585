/* A tile of traces on its way back: its working memory and its random numbers. */
#ifndef RECALL_TILE_H
#define RECALL_TILE_H

#include <stdlib.h>

#include "layers.h"
#include "philox.h"

#if defined(_MSC_VER)
#include <intrin.h>
static int64_t atomic_add(int64_t *to, int64_t n) { return _InterlockedExchangeAdd64(to, n); }
#else
static int64_t atomic_add(int64_t *to, int64_t n) {
    return __atomic_fetch_add(to, n, __ATOMIC_RELAXED);
}
#endif

/* Rows of TILE numbers each, one number a trace. */
typedef struct {
    const recall_model *model;
    packed_model packed;
    recall_call *call;
    philox_keys keys;
    int64_t first;     /* row of the call */
    int64_t start[TILE]; /* where a trace's start lies in the call's */
    int count, lanes;  /* traces, and the same rounded up to whole vectors */
    float *state;      /* [state_size] */
    float *features;   /* [dense inputs of the delta network]: state, then action */
    uint32_t *pairs;   /* the same as operands, for bfloat16 */
    int32_t *index;    /* [one-hot inputs]: state, then action */
    float *hidden[2];  /* [max_width] */
    float *base;       /* [max_width]: bias and one-hot share of a first layer */
    float *output;     /* [max_width] */
    float *noise;      /* [max size of a head, rounded up to whole blocks of random numbers] */
    float *action;     /* [A], in the action's own unit */
    float *row;        /* [max_width]: one trace's outputs, or a number a trace */
    int32_t chosen[TILE]; /* the class of the last draw */
    int32_t action_class[TILE];
    float action_log_prob[TILE], delta_log_prob[TILE], check[TILE];
    uint8_t over[TILE], broken[TILE]; /* the episode has begun; has left the numbers */
    int32_t *visited; /* [TILE][capacity]: hash tables of steps by state, where that is asked */
    void *memory;
} tile;

INLINE int64_t dense_state(const recall_model *m) { return m->is_discrete ? 0 : m->state_size; }
INLINE int64_t dense_action(const recall_model *m) {
    return is_continuous(&m->action) ? m->action.size : 0;
}
INLINE int64_t hot_state(const recall_model *m) {
    return m->is_discrete ? m->state_size + m->has_joint_code : 0;
}

/* Slots of a trace's table of visits: a power of two, twice the states at least. */
static int64_t visit_capacity(const recall_call *call) {
    int64_t capacity = 16;
    while (capacity < 2 * (call->num_steps + 1)) capacity *= 2;
    return capacity;
}

/* Lays the tile's memory out from `start` and returns its end. */
static uintptr_t place_tile(tile *t, uintptr_t start) {
    const recall_model *m = t->model;
    const int64_t of_floats = TILE * sizeof(float), width = t->packed.max_width;
    int64_t inputs = dense_state(m) + dense_action(m);
    int64_t delta = m->delta.size + (m->delta.kind == HEAD_MIXTURE);
    int64_t size = m->action.size > delta ? m->action.size : delta;
    uintptr_t cursor = start;
    t->state = take(&cursor, m->state_size * of_floats);
    t->features = take(&cursor, inputs * of_floats);
    t->pairs = take(&cursor, (inputs + 1) / 2 * of_floats);
    t->index = take(&cursor, (hot_state(m) + 1) * of_floats);
    t->hidden[0] = take(&cursor, width * of_floats);
    t->hidden[1] = take(&cursor, width * of_floats);
    t->base = take(&cursor, width * of_floats);
    t->output = take(&cursor, width * of_floats);
    t->noise = take(&cursor, ROUND_UP(size, 4) * of_floats);
    t->action = take(&cursor, m->action.size * of_floats);
    t->row = take(&cursor, ROUND_UP(width, WIDEST_VECTOR) * (int64_t)sizeof(float));
    int64_t visits = t->call->last_visit ? visit_capacity(t->call) : 0;
    t->visited = take(&cursor, visits * TILE * (int64_t)sizeof *t->visited);
    return cursor;
}

static int open_tile(tile *t) {
    t->memory = malloc((size_t)place_tile(t, 0) + 64);
    if (!t->memory) return 0;
    place_tile(t, ROUND_UP((uintptr_t)t->memory, 64));
    return 1;
}

/* ---- random numbers ---- */

INLINE vi rows_of(const tile *t, int lane) { return vi_from((uint32_t)(t->first + lane)); }

/* Noise that was given, [T, rows, size], as rows of the tile. */
static void read_noise(tile *t, const float *given, int64_t size, int64_t step) {
    const float *from = given + (step * t->call->num_rows + t->first) * size;
    for (int lane = 0; lane < t->lanes; lane++) {
        for (int64_t i = 0; i < size; i++) t->noise[i * TILE + lane] = from[i];
        if (lane + 1 < t->count) from += size; /* lanes beyond repeat the last trace */
    }
}

/* Standard normals for `size` features at `noise`; `step` is the index of the output. */
static void draw_normals(tile *t, int head, int64_t size, int64_t step, const float *given) {
    if (given) {
        read_noise(t, given, size, step);
        return;
    }
    vi back = vi_set((uint32_t)(t->call->num_steps - 1 - step));
    /* All words first: both are long chains of operations, and short loops overlap better. */
    for (int64_t block = 0; block * 4 < size; block++) {
        float *to = t->noise + block * 4 * TILE;
        for (int lane = 0; lane < t->lanes; lane += LANES) {
            vi word[4];
            philox(rows_of(t, lane), back, (uint32_t)head << 16 | (uint32_t)block, &t->keys, word);
            for (int i = 0; i < 4; i++) vi_store(to + i * TILE + lane, word[i]);
        }
    }
    for (int64_t i = 0; i < size; i += 2) {
        float *to = t->noise + i * TILE;
        for (int lane = 0; lane < t->lanes; lane += LANES) {
            vf z[2];
            box_muller(vi_load(to + lane), vi_load(to + TILE + lane), &z[0], &z[1]);
            v_store(to + lane, z[0]);
            v_store(to + TILE + lane, z[1]);
        }
    }
}

/* Uniform numbers in [0, 1) at the first row of `noise`. */
static void draw_uniforms(tile *t, int word_index, int64_t step, const float *given) {
    if (given) {
        read_noise(t, given, 1, step);
        return;
    }
    vi back = vi_set((uint32_t)(t->call->num_steps - 1 - step));
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        vi word[4];
        philox(rows_of(t, lane), back, HEAD_UNIFORM << 16, &t->keys, word);
        v_store(t->noise + lane, uniform(word[word_index]));
    }
}

/* ---- networks ---- */

/* The state as the networks see it. */
static void look(tile *t) {
    const recall_model *m = t->model;
    if (!m->is_discrete) {
        for (int64_t i = 0; i < m->state_size; i++) {
            vf mean = v_set(t->packed.mean[i]);
            for (int lane = 0; lane < t->lanes; lane += LANES) {
                int64_t at = i * TILE + lane;
                v_store(t->features + at, v_sub(v_load(t->state + at), mean));
            }
        }
        return;
    }
    for (int lane = 0; lane < t->lanes; lane++) {
        int64_t joint = 0;
        for (int64_t i = 0; i < m->state_size; i++) {
            int32_t value = (int32_t)t->state[i * TILE + lane];
            joint = joint * m->cardinality[i] + value;
            t->index[i * TILE + lane] = (int32_t)t->packed.offset[i] + value;
        }
        if (m->has_joint_code)
            t->index[m->state_size * TILE + lane] =
                (int32_t)(t->packed.offset[m->state_size] + joint);
    }
}

/* Bias and share of the one-hot inputs, into `base`; NULL if there are none. */
static const float *embed(tile *t, const packed_layer *layer, int64_t count) {
    if (!layer->columns) return NULL;
    int64_t stride = ROUND_UP(layer->outputs, WIDEST_VECTOR);
    for (int lane = 0; lane < t->lanes; lane++) {
        for (int64_t j = 0; j < layer->outputs; j += LANES) {
            vf sum = v_load(layer->bias + j);
            for (int64_t i = 0; i < count; i++) {
                const float *column = layer->columns + t->index[i * TILE + lane] * stride;
                sum = v_add(sum, v_load(column + j));
            }
            v_store(t->row + j, sum);
        }
        for (int64_t j = 0; j < layer->outputs; j++) t->base[j * TILE + lane] = t->row[j];
    }
    return t->base;
}

/* Runs a network on the tile's features and leaves its output at `output`. */
static void run(tile *t, int which, int64_t num_hot) {
    const packed_network *network = &t->packed.network[which];
    const operand *in = (const operand *)t->features;
#if RECALL_BFLOAT16
    int64_t inputs = network->layer[0].inputs;
    for (int64_t i = 0; i < inputs; i += 2) {
        for (int lane = 0; lane < t->lanes; lane += LANES) {
            const float *even = t->features + i * TILE + lane;
            vf odd = i + 1 < inputs ? v_load(even + TILE) : v_set(0.0f);
            vi_store(t->pairs + i / 2 * TILE + lane, to_pairs(v_load(even), odd));
        }
    }
    in = t->pairs;
#endif
    for (int64_t i = 0; i < network->num_layers; i++) {
        const packed_layer *layer = &network->layer[i];
        int is_last = i + 1 == network->num_layers;
        float *out = is_last ? t->output : t->hidden[i % 2];
        const float *base = i == 0 ? embed(t, layer, num_hot) : NULL;
        dense(network, layer, is_last, in, base, out, t->lanes);
        in = (const operand *)out;
    }
}

/* The same for the network of actions; without one they are equally likely. */
static void run_action(tile *t) {
    const recall_model *m = t->model;
    if (t->packed.network[NETWORK_ACTION].num_layers) {
        run(t, NETWORK_ACTION, hot_state(m));
    } else if (!is_continuous(&m->action)) {
        memset(t->output, 0, (size_t)(m->action.size * TILE) * sizeof *t->output);
    }
}

#endif

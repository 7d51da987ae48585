/* Packing: the model's live parameters into the layout of the kernels, beside a copy of them. */
#include "packed.h"

#include <math.h>
#include <string.h>

#define LOG_SQRT_2_PI 0.91893853320467274

/* Inputs of a first layer: `hot` one-hot features of the state, dense ones, `hot` ones of the
 * action, in the order of the weight's columns. */
typedef struct {
    int64_t hot_before, dense, hot_after;
} inputs;

static inputs first_inputs(const recall_model *m, int which) {
    inputs in = {0, 0, 0};
    if (m->is_discrete) in.hot_before = m->feature_size;
    else in.dense = m->state_size;
    if (which == NETWORK_DELTA) {
        if (is_continuous(&m->action)) in.dense += m->action.size;
        else in.hot_after = m->action.size;
    }
    return in;
}

/* ---- the copy of the live parameters ---- */

/* `live` points to the model's own pointer. */
typedef int (*visitor)(char *copy, const float **live, size_t bytes);

static int write_copy(char *copy, const float **live, size_t bytes) {
    memcpy(copy, *live, bytes);
    *live = (const float *)copy;
    return 1;
}

static int same_copy(char *copy, const float **live, size_t bytes) {
    return memcmp(copy, *live, bytes) == 0;
}

static int size_only(char *copy, const float **live, size_t bytes) {
    (void)copy, (void)live, (void)bytes;
    return 1;
}

/* Visits every array of the model with its place in the copy, until one visit returns 0.
 * Returns the bytes visited, or -1. */
static int64_t visit(recall_model *m, char *copy, visitor see) {
    int64_t at = 0;
#define VISIT(live, count)                                                                        \
    do {                                                                                          \
        size_t bytes = (size_t)(count) * sizeof *(live);                                          \
        if ((live) && !see(copy ? copy + at : NULL, &(live), bytes)) return -1;                   \
        if (live) at += (int64_t)bytes;                                                           \
    } while (0)
    for (int n = 0; n < NUM_NETWORKS; n++) {
        recall_network *network = &m->network[n];
        for (int64_t i = 0; i < network->num_layers; i++) {
            VISIT(network->weight[i], network->width[i] * network->width[i + 1]);
            VISIT(network->bias[i], network->width[i + 1]);
        }
    }
    recall_head *heads[] = {&m->action, &m->delta};
    for (int i = 0; i < 2; i++) {
        VISIT(heads[i]->mean, heads[i]->size);
        VISIT(heads[i]->spread, heads[i]->size);
    }
    VISIT(m->mean, m->state_size);
    VISIT(m->variance, m->state_size);
#undef VISIT
    return at;
}

/* ---- the layout ---- */

int64_t packed_layout(const recall_model *m, const void *block, packed_model *packed) {
    uintptr_t cursor = (uintptr_t)block;
    int64_t widest = m->action.size > m->delta.size ? m->action.size : m->delta.size;
    if (widest < TILE) widest = TILE; /* a row of a tile must fit, too */
    memset(packed, 0, sizeof *packed);
    recall_model own = *m;
    take(&cursor, visit(&own, NULL, size_only));
    for (int n = 0; n < NUM_NETWORKS; n++) {
        const recall_network *network = &m->network[n];
        packed_network *to = &packed->network[n];
        to->num_layers = network->num_layers;
        to->activation = network->activation;
        to->slope = network->slope;
        for (int64_t i = 0; i < network->num_layers; i++) {
            packed_layer *layer = &to->layer[i];
            inputs in = {0, network->width[i], 0};
            if (i == 0) in = first_inputs(m, n);
            int64_t hot = in.hot_before + in.hot_after;
            int64_t outputs = network->width[i + 1];
            int64_t padded = ROUND_UP(outputs, WIDEST_VECTOR);
            layer->inputs = in.dense;
            layer->outputs = outputs;
            if (m->is_bfloat16) {
                layer->weight_pairs = take(&cursor, (in.dense + 1) / 2 * outputs * 4);
            } else {
                layer->weight = take(&cursor, in.dense * outputs * 4);
            }
            layer->bias = take(&cursor, padded * 4);
            layer->columns = hot ? take(&cursor, hot * padded * 4) : NULL;
            if (outputs > widest) widest = outputs;
        }
    }
    packed->mean = take(&cursor, m->is_discrete ? 0 : m->state_size * 4);
    int64_t action = is_continuous(&m->action) ? m->action.size * 4 : 0;
    int64_t delta = is_continuous(&m->delta) ? m->delta.size * 4 : 0;
    packed->action_add = take(&cursor, action);
    packed->action_times = take(&cursor, action);
    packed->delta_unit = take(&cursor, delta);
    packed->delta_log_unit = take(&cursor, delta);
    packed->constants = take(&cursor, 2 * 4);
    packed->offset = take(&cursor, m->is_discrete ? (m->state_size + 1) * 8 : 0);
    packed->max_width = widest;
    return (int64_t)(cursor - (uintptr_t)block);
}

/* ---- the contents ---- */

static float standard_deviation(float variance, float floor) {
    float std = sqrtf(variance);
    return std < floor ? floor : std; /* a NaN stays */
}

static uint32_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40; /* stays a NaN */
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

/* A weight of a dense input; those that see a normalised state carry its scale. */
static float weight_at(const recall_network *network, int64_t i, int64_t out, int64_t in,
                       const float *std, int64_t num_std) {
    float weight = network->weight[i][out * network->width[i] + in];
    return in < num_std ? weight / std[in] : weight;
}

static void pack_layer(const recall_model *m, int which, int64_t i, const packed_layer *layer,
                       const float *std) {
    const recall_network *network = &m->network[which];
    inputs in = {0, layer->inputs, 0};
    if (i == 0) in = first_inputs(m, which);
    int64_t num_std = i == 0 && !m->is_discrete ? m->state_size : 0;
    float *weight = (float *)layer->weight;
    uint32_t *pairs = (uint32_t *)layer->weight_pairs;
    for (int64_t j = 0; j < layer->outputs; j += ROWS) {
        int64_t rows = layer->outputs - j < ROWS ? layer->outputs - j : ROWS;
        for (int64_t k = 0; k < in.dense; k += m->is_bfloat16 ? 2 : 1) {
            for (int64_t r = 0; r < rows; r++) {
                int64_t from = in.hot_before + k;
                float even = weight_at(network, i, j + r, from, std, num_std), odd = 0;
                if (!m->is_bfloat16) {
                    *weight++ = even;
                    continue;
                }
                if (k + 1 < in.dense) odd = weight_at(network, i, j + r, from + 1, std, num_std);
                *pairs++ = to_bfloat16(even) | to_bfloat16(odd) << 16;
            }
        }
    }
    memcpy((float *)layer->bias, network->bias[i], (size_t)layer->outputs * 4);
    if (!layer->columns) return;
    float *columns = (float *)layer->columns;
    int64_t padded = ROUND_UP(layer->outputs, WIDEST_VECTOR);
    for (int64_t hot = 0; hot < in.hot_before + in.hot_after; hot++) {
        int64_t column = hot < in.hot_before ? hot : hot + in.dense;
        for (int64_t j = 0; j < layer->outputs; j++)
            columns[hot * padded + j] = network->weight[i][j * network->width[i] + column];
    }
}

static void pack_heads(const recall_model *m, const packed_model *packed) {
    float *constants = (float *)packed->constants;
    double total = 0;
    for (int64_t i = 0; is_continuous(&m->action) && i < m->action.size; i++) {
        float spread = m->action.spread[i];
        if (m->action.kind == HEAD_NORMAL) spread = standard_deviation(spread, m->action.floor);
        ((float *)packed->action_add)[i] = m->action.mean[i];
        ((float *)packed->action_times)[i] = spread;
        total += m->action.kind == HEAD_BOX ? log(2.0 * spread) : log(spread) + LOG_SQRT_2_PI;
    }
    constants[0] = (float)-total;
    if (!is_continuous(&m->delta)) return;
    const recall_network *network = &m->network[NETWORK_DELTA];
    float *bias = (float *)packed->network[NETWORK_DELTA].layer[network->num_layers - 1].bias;
    const int is_mixture = m->delta.kind == HEAD_MIXTURE;
    total = LOG_SQRT_2_PI * (double)m->delta.size;
    for (int64_t i = 0; i < m->delta.size; i++) {
        float unit = standard_deviation(m->delta.spread[i], m->delta.floor);
        ((float *)packed->delta_unit)[i] = unit;
        ((float *)packed->delta_log_unit)[i] = logf(unit);
        /* The walk multiplies the location by the unit; its mean enters here. */
        for (int64_t k = 0; k < (is_mixture ? m->delta.components : 1); k++)
            bias[k * m->delta.size + i] += m->delta.mean[i] / unit;
        if (is_mixture) total += log(unit);
    }
    constants[1] = (float)-total;
}

void recall_pack(const recall_model *live, void *block) {
    packed_model packed;
    recall_model copied = *live, *m = &copied;
    memset(block, 0, (size_t)packed_layout(live, block, &packed));
    /* From here on `m` points to the copy: what is packed is what is compared, whoever writes. */
    visit(m, block, write_copy);
    /* `mean` first holds the standard deviations, while weights are scaled by them. */
    float *mean = (float *)packed.mean;
    for (int64_t i = 0; !m->is_discrete && i < m->state_size; i++)
        mean[i] = standard_deviation(m->variance[i], m->floor);
    for (int n = 0; n < NUM_NETWORKS; n++) {
        for (int64_t i = 0; i < m->network[n].num_layers; i++)
            pack_layer(m, n, i, &packed.network[n].layer[i], mean);
    }
    if (!m->is_discrete) memcpy(mean, m->mean, (size_t)m->state_size * 4);
    pack_heads(m, &packed);
    int64_t *offset = (int64_t *)packed.offset;
    for (int64_t i = 0; m->is_discrete && i < m->state_size; i++)
        offset[i + 1] = offset[i] + m->cardinality[i];
}

int64_t recall_packed_bytes(const recall_model *m) {
    packed_model packed;
    return packed_layout(m, NULL, &packed);
}

int64_t recall_is_current(const recall_model *m, const void *block) {
    recall_model own = *m;
    return visit(&own, (char *)block, same_copy) >= 0;
}

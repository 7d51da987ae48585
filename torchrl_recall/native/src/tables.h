/* Models whose states and actions can be counted: every distribution once, then only look up.
 *
 * The tables hold what the walk of tile.h would compute, number by number, so that both walks are
 * the same to the bit.
 */
#ifndef RECALL_TABLES_H
#define RECALL_TABLES_H

#include <math.h>

#include "output.h"

/* Cumulative shares that are compared at once. */
#define COUNTED 8

typedef struct {
    int64_t num_states, num_actions, num_deltas;
    int64_t action_stride, delta_stride;        /* of a distribution's cumulative shares */
    float *action_total, *delta_total;          /* [states], [states, actions] */
    float *action_cumulative, *delta_cumulative; /* [.., stride]: all but the last, then infinity */
    float *action_log_prob, *delta_log_prob;    /* [states, actions], [states, actions, deltas] */
    float *stop;                                /* [states], probability; or NULL */
    int32_t *predecessor;                       /* [states, deltas] */
    int64_t *coordinates;                       /* [states, state_size] */
    uint8_t *dead_end;                          /* [states] */
} tables;

static int64_t tables_layout(const recall_model *m, void *memory, tables *to) {
    uintptr_t cursor = (uintptr_t)memory;
    int64_t states = 1, actions = m->action.size, deltas = m->delta.size;
    for (int64_t i = 0; i < m->state_size; i++) states *= m->cardinality[i];
    to->num_states = states;
    to->num_actions = actions;
    to->num_deltas = deltas;
    to->action_stride = ROUND_UP(actions, COUNTED);
    to->delta_stride = ROUND_UP(deltas, COUNTED);
    to->action_total = take(&cursor, states * 4);
    to->delta_total = take(&cursor, states * actions * 4);
    to->action_cumulative = take(&cursor, states * to->action_stride * 4);
    to->delta_cumulative = take(&cursor, states * actions * to->delta_stride * 4);
    to->action_log_prob = take(&cursor, states * actions * 4);
    to->delta_log_prob = take(&cursor, states * actions * deltas * 4);
    to->stop = m->network[NETWORK_STOP].num_layers ? take(&cursor, states * 4) : NULL;
    to->predecessor = take(&cursor, states * deltas * 4);
    to->coordinates = take(&cursor, states * m->state_size * 8);
    to->dead_end = take(&cursor, states);
    return (int64_t)(cursor - (uintptr_t)memory);
}

/* Sets the tile's traces to states `first` and on, each `repeats` times, as the networks see them. */
static void enter_states(tile *t, int64_t first, int64_t count, int64_t repeats) {
    const recall_model *m = t->model;
    t->count = (int)count;
    t->lanes = (int)ROUND_UP(count, LANES);
    for (int lane = 0; lane < t->lanes; lane++) {
        int64_t entry = first + (lane < count ? lane : count - 1), rest = entry / repeats;
        t->action_class[lane] = (int32_t)(entry % repeats);
        t->index[hot_state(m) * TILE + lane] = (int32_t)m->feature_size + t->action_class[lane];
        t->over[lane] = 0;
        for (int64_t i = m->state_size - 1; i >= 0; i--) {
            t->state[i * TILE + lane] = (float)(rest % m->cardinality[i]);
            rest /= m->cardinality[i];
        }
    }
    look(t);
}

/* Writes cumulative and log-probabilities of the logits at `output`, a trace a row. */
static void tabulate(tile *t, int64_t n, float *sum, float *cumulative, int64_t stride,
                     float *log_prob) {
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        const float *logits = t->output + lane;
        vf greatest = v_load(logits), total = v_set(0.0f);
        for (int64_t j = 1; j < n; j++) greatest = v_max(greatest, v_load(logits + j * TILE));
        for (int64_t j = 0; j < n; j++) {
            total = v_add(total, v_exp(v_sub(v_load(logits + j * TILE), greatest)));
            v_store(t->hidden[0] + j * TILE + lane, total);
        }
        v_store(t->row + lane, total);
        vf log_total = v_log(total);
        for (int64_t j = 0; j < n; j++) {
            vf share = v_sub(v_load(logits + j * TILE), greatest);
            v_store(t->hidden[1] + j * TILE + lane, v_sub(share, log_total));
        }
    }
    memcpy(sum, t->row, (size_t)t->count * sizeof *sum);
    for (int64_t i = 0; i < t->count * stride; i++) cumulative[i] = INFINITY;
    write_floats(t->hidden[0], n - 1, t->count, cumulative, NULL, stride);
    write_floats(t->hidden[1], n, t->count, log_prob, NULL, n);
}

/* The states that the deltas lead to; a displacement that leaves the spec is never drawn. */
static void tabulate_predecessors(const recall_model *m, const tables *to) {
    const int64_t size = m->state_size;
    for (int64_t s = 0; s < to->num_states; s++) {
        int64_t *at = to->coordinates + s * size, rest = s, any = 0;
        for (int64_t i = size - 1; i >= 0; i--) {
            at[i] = rest % m->cardinality[i];
            rest /= m->cardinality[i];
        }
        for (int64_t j = 0; j < to->num_deltas; j++) {
            int64_t there = 0, inside = 1;
            for (int64_t i = 0; m->delta.kind == HEAD_SUPPORT && i < size; i++) {
                int64_t x = at[i] + (int64_t)m->support[j * size + i];
                inside &= x >= 0 && x < m->cardinality[i];
                there = there * m->cardinality[i] + x;
            }
            if (m->delta.kind == HEAD_CLASS) there = j;
            any |= inside;
            to->predecessor[s * to->num_deltas + j] = (int32_t)(inside ? there : s);
        }
        to->dead_end[s] = m->has_dead_ends && !any;
    }
}

int64_t NAME(recall_table_bytes)(const recall_model *model);
int64_t NAME(recall_table_bytes)(const recall_model *model) {
    tables to;
    return tables_layout(model, NULL, &to);
}

int64_t NAME(recall_tables)(const recall_model *model, const void *block, void *memory);
int64_t NAME(recall_tables)(const recall_model *model, const void *block, void *memory) {
    recall_call call;
    tile t;
    tables to;
    memset(&call, 0, sizeof call);
    memset(&t, 0, sizeof t);
    t.model = model;
    t.call = &call;
    packed_layout(model, block, &t.packed);
    tables_layout(model, memory, &to);
    if (!open_tile(&t)) return NO_MEMORY;
    for (int64_t first = 0; first < to.num_states; first += TILE) {
        int64_t left = to.num_states - first;
        enter_states(&t, first, left < TILE ? left : TILE, 1);
        run_action(&t);
        tabulate(&t, to.num_actions, to.action_total + first,
                 to.action_cumulative + first * to.action_stride, to.action_stride,
                 to.action_log_prob + first * to.num_actions);
        if (!to.stop) continue;
        run(&t, NETWORK_STOP, hot_state(model));
        for (int lane = 0; lane < t.lanes; lane += LANES)
            v_store(t.output + lane, v_sigmoid(v_load(t.output + lane)));
        memcpy(to.stop + first, t.output, (size_t)t.count * 4);
    }
    const int64_t pairs = to.num_states * to.num_actions;
    for (int64_t first = 0; first < pairs; first += TILE) {
        int64_t left = pairs - first;
        enter_states(&t, first, left < TILE ? left : TILE, to.num_actions);
        run(&t, NETWORK_DELTA, hot_state(model) + 1);
        if (model->delta.kind == HEAD_SUPPORT) mask_support(&t);
        tabulate(&t, to.num_deltas, to.delta_total + first,
                 to.delta_cumulative + first * to.delta_stride, to.delta_stride,
                 to.delta_log_prob + first * to.num_deltas);
    }
    tabulate_predecessors(model, &to);
    free(t.memory);
    return OK;
}

#endif

/* Models whose states and actions can be counted: every distribution once, then only look up.
 *
 * The tables hold what the walk of tile.h would compute, number by number, so that both walks are
 * the same to the bit.
 */
#ifndef RECALL_TABLES_H
#define RECALL_TABLES_H

#include "output.h"

typedef struct {
    int64_t num_states, num_actions, num_deltas;
    float *action_cumulative, *action_log_prob; /* [states, actions] */
    float *delta_cumulative, *delta_log_prob;   /* [states, actions, deltas] */
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
    to->action_cumulative = take(&cursor, states * actions * 4);
    to->action_log_prob = take(&cursor, states * actions * 4);
    to->delta_cumulative = take(&cursor, states * actions * deltas * 4);
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
static void tabulate(tile *t, int64_t n, float *cumulative, float *log_prob) {
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        const float *logits = t->output + lane;
        vf greatest = v_load(logits), total = v_set(0.0f);
        for (int64_t j = 1; j < n; j++) greatest = v_max(greatest, v_load(logits + j * TILE));
        for (int64_t j = 0; j < n; j++) {
            total = v_add(total, v_exp(v_sub(v_load(logits + j * TILE), greatest)));
            v_store(t->hidden[0] + j * TILE + lane, total);
        }
        vf log_total = v_log(total);
        for (int64_t j = 0; j < n; j++) {
            vf share = v_sub(v_load(logits + j * TILE), greatest);
            v_store(t->hidden[1] + j * TILE + lane, v_sub(share, log_total));
        }
    }
    write_floats(t->hidden[0], n, t->count, cumulative, NULL, n);
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
        run(&t, NETWORK_ACTION, hot_state(model));
        tabulate(&t, to.num_actions, to.action_cumulative + first * to.num_actions,
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
        tabulate(&t, to.num_deltas, to.delta_cumulative + first * to.num_deltas,
                 to.delta_log_prob + first * to.num_deltas);
    }
    tabulate_predecessors(model, &to);
    free(t.memory);
    return OK;
}

/* How many of the cumulative shares but the last lie at or below the drawn one. */
INLINE int64_t look_up(const float *cumulative, int64_t n, float uniform) {
    const float threshold = uniform * cumulative[n - 1] * (1.0f - UNIT_ROUNDOFF);
    int64_t low = 0, high = n - 1;
    if (n <= 16) {
        for (int64_t j = 0; j + 1 < n; j++) low += cumulative[j] <= threshold;
        return low;
    }
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (cumulative[middle] <= threshold) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Uniforms of one trace: [steps][action, delta, stop]. */
static void draw_trace(const recall_call *call, const philox_keys *keys, int64_t row, float *to) {
    const int64_t num_steps = call->num_steps;
    if (call->noise_action) {
        for (int64_t step = 0; step < num_steps; step++) {
            const int64_t at = step * call->num_rows + row;
            to[step * 3 + WORD_ACTION] = call->noise_action[at];
            to[step * 3 + WORD_DELTA] = call->noise_delta[at];
            to[step * 3 + WORD_STOP] = call->noise_stop ? call->noise_stop[at] : 0.0f;
        }
        return;
    }
    for (int64_t back = 0; back < num_steps; back += LANES) {
        uint32_t steps[LANES];
        float lanes[3][LANES];
        vi word[4];
        for (int i = 0; i < LANES; i++) steps[i] = (uint32_t)(back + i);
        philox(vi_set((uint32_t)row), vi_load(steps), HEAD_UNIFORM << 16, keys, word);
        for (int i = 0; i < 3; i++) v_store(lanes[i], uniform(word[i]));
        for (int64_t i = 0; i < LANES && back + i < num_steps; i++) {
            for (int j = 0; j < 3; j++) to[(num_steps - 1 - back - i) * 3 + j] = lanes[j][i];
        }
    }
}

/* Walks one trace; returns whether its first step is finite, or -1 for a start that is no state. `seen` holds, for each state, the last
 * trace that visited it, counted from 1. */
static int walk_trace(const recall_model *m, const tables *from, const recall_call *call,
                      int64_t row, const float *uniforms, int64_t *seen) {
    const int64_t size = m->state_size, num_steps = call->num_steps;
    const int64_t *start = (const int64_t *)call->start + row / call->num_traces * size;
    const size_t bytes = (size_t)size * sizeof(int64_t);
    int64_t s = 0;
    int over = 0, broken = 0, finite_first = 0;
    for (int64_t i = 0; i < size; i++) {
        if (start[i] < 0 || start[i] >= m->cardinality[i]) return -1;
        s = s * m->cardinality[i] + start[i];
    }
    if (seen) seen[s] = row + 1;
    for (int64_t step = num_steps - 1; step >= 0; step--) {
        const int64_t at = row * num_steps + step;
        const float *uniform_at = uniforms + step * 3;
        if (from->stop) over |= uniform_at[WORD_STOP] < from->stop[s];
        const int64_t row_a = s * from->num_actions;
        const int64_t action =
            look_up(from->action_cumulative + row_a, from->num_actions, uniform_at[WORD_ACTION]);
        const int64_t row_d = (row_a + action) * from->num_deltas;
        const int64_t delta =
            look_up(from->delta_cumulative + row_d, from->num_deltas, uniform_at[WORD_DELTA]);
        const float action_log_prob = from->action_log_prob[row_a + action];
        const float delta_log_prob = from->delta_log_prob[row_d + delta];
        memcpy((int64_t *)call->next_state + at * size,
               broken ? start : from->coordinates + s * size, bytes);
        broken |= !(action_log_prob * 0.0f + delta_log_prob * 0.0f == 0.0f);
        over |= from->dead_end[s];
        s = from->predecessor[s * from->num_deltas + delta];
        memcpy((int64_t *)call->state + at * size, broken ? start : from->coordinates + s * size,
               bytes);
        ((int64_t *)call->action)[at] = action;
        call->action_log_prob[at] = broken ? 0.0f : action_log_prob;
        call->delta_log_prob[at] = broken ? 0.0f : delta_log_prob;
        int again = 0;
        if (seen) {
            again = seen[s] == row + 1;
            seen[s] = row + 1;
        }
        call->mask[at] = !(over | broken | again);
        if (step == num_steps - 1) finite_first = !broken;
    }
    return finite_first;
}

int64_t NAME(recall_look_up)(const recall_model *model, const void *memory, recall_call *call);
int64_t NAME(recall_look_up)(const recall_model *model, const void *memory, recall_call *call) {
    tables from;
    philox_keys keys;
    tables_layout(model, (void *)memory, &from);
    schedule_keys(&keys, (uint64_t)call->seed);
    float *uniforms = malloc((size_t)(call->num_steps * 3) * sizeof *uniforms);
    int64_t *seen = call->last_visit ? calloc((size_t)from.num_states, sizeof *seen) : NULL;
    int64_t status = uniforms && (seen || !call->last_visit) ? OK : NO_MEMORY;
    while (status == OK) {
        int64_t first = atomic_add(&call->next_tile, 1) * TILE, finite = 0;
        if (first >= call->num_rows) break;
        for (int64_t row = first; row < first + TILE && row < call->num_rows; row++) {
            draw_trace(call, &keys, row, uniforms);
            int found = walk_trace(model, &from, call, row, uniforms, seen);
            if (found < 0) atomic_add(&call->bad_starts, 1);
            else finite += found;
        }
        atomic_add(&call->finite_rows, finite);
    }
    free(uniforms);
    free(seen);
    return status;
}

#endif

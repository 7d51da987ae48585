/* The walk by tables: traces in groups, whose steps are drawn and looked up side by side. */
#ifndef RECALL_LOOK_UP_H
#define RECALL_LOOK_UP_H

#include "tables.h"

/* How many of COUNTED numbers are at most `threshold`. */
INLINE int count_below(const float *numbers, float threshold) {
#if RECALL_ISA
    __m256 below = _mm256_cmp_ps(_mm256_loadu_ps(numbers), _mm256_set1_ps(threshold), _CMP_LE_OQ);
    return __builtin_popcount((unsigned)_mm256_movemask_ps(below));
#else
    int count = 0;
    for (int i = 0; i < COUNTED; i++) count += numbers[i] <= threshold;
    return count;
#endif
}

/* How many of the cumulative shares lie at or below the drawn one: the class. */
INLINE int64_t look_up(const float *cumulative, int64_t n, int64_t stride, float total,
                       float uniform) {
    const float threshold = uniform * total * (1.0f - UNIT_ROUNDOFF);
    int64_t low = 0, high = stride / COUNTED - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cumulative[middle * COUNTED + COUNTED - 1] <= threshold) low = middle + 1;
        else high = middle;
    }
    low = low * COUNTED + count_below(cumulative + low * COUNTED, threshold);
    return low < n ? low : n - 1; /* noise that was given may be infinite */
}

/* Traces that walk side by side, so that one's loads fill another's waiting time. */
#define GROUP 16

typedef struct {
    const recall_model *model;
    const tables *from;
    const recall_call *call;
    int64_t first;   /* row of the call */
    int count;       /* at most GROUP */
    float *uniforms; /* [steps][3][GROUP] */
    int32_t *path;   /* [steps + 1][GROUP], for last visits; or NULL */
    uint32_t broken; /* bits */
    int64_t state[GROUP];
    uint8_t over[GROUP];
} group;

/* Of given noise an infinite number may be among them: nothing else relies on a range. */
static void read_group(const group *g) {
    const recall_call *call = g->call;
    for (int64_t step = 0; step < call->num_steps; step++) {
        float *to = g->uniforms + step * 3 * GROUP;
        const int64_t at = step * call->num_rows + g->first;
        for (int i = 0; i < GROUP; i++) {
            const int64_t from = at + (i < g->count ? i : 0);
            to[WORD_ACTION * GROUP + i] = call->noise_action[from];
            to[WORD_DELTA * GROUP + i] = call->noise_delta[from];
            to[WORD_STOP * GROUP + i] = call->noise_stop ? call->noise_stop[from] : 0.0f;
        }
    }
}

NOINLINE void draw_group(const group *g, const philox_keys *keys) {
    const int64_t num_steps = g->call->num_steps;
    for (int i = 0; i < GROUP; i += LANES) {
        const vi row = vi_from((uint32_t)(g->first + i));
        for (int64_t step = 0; step < num_steps; step++) {
            float *to = g->uniforms + step * 3 * GROUP + i;
            vi word[4], back = vi_set((uint32_t)(num_steps - 1 - step));
            philox(row, back, HEAD_UNIFORM << 16, keys, word);
            for (int j = 0; j < 3; j++) v_store(to + j * GROUP, uniform(word[j]));
        }
    }
}

/* What a step of the group draws: classes, where they are in the tables, and what is found there. */
typedef struct {
    int64_t action[GROUP], pair[GROUP], change[GROUP];
    float action_log_prob[GROUP], delta_log_prob[GROUP];
} choice;

/* Draws an action and a change for each trace of the group. The two strides, of cumulative shares,
 * may be constants that the compiler knows. */
INLINE void choose_step(const group *g, const float *uniforms, int64_t action_stride,
                        int64_t delta_stride, choice *to) {
    const tables from = *g->from;
    for (int i = 0; i < GROUP; i++) {
        const int64_t s = g->state[i];
        const int64_t action =
            look_up(from.action_cumulative + s * action_stride, from.num_actions, action_stride,
                    from.action_total[s], uniforms[WORD_ACTION * GROUP + i]);
        to->action[i] = action;
        to->pair[i] = s * from.num_actions + action;
    }
    for (int i = 0; i < GROUP; i++)
        to->change[i] = look_up(from.delta_cumulative + to->pair[i] * delta_stride, from.num_deltas,
                                delta_stride, from.delta_total[to->pair[i]],
                                uniforms[WORD_DELTA * GROUP + i]);
}

/* Looks up what was drawn, notes what ends a trace, and takes the group there. */
INLINE void go_to(group *g, const float *uniforms, choice *to) {
    const tables from = *g->from;
    if (g->model->has_dead_ends) {
        for (int i = 0; i < GROUP; i++) g->over[i] |= from.dead_end[g->state[i]];
    }
    if (from.stop) {
        for (int i = 0; i < GROUP; i++)
            g->over[i] |= !(from.stop[g->state[i]] <= uniforms[WORD_STOP * GROUP + i]);
    }
    for (int i = 0; i < GROUP; i++) {
        const int64_t pair = to->pair[i], change = to->change[i];
        to->action_log_prob[i] = from.action_log_prob[pair];
        to->delta_log_prob[i] = from.delta_log_prob[pair * from.num_deltas + change];
        g->state[i] = from.predecessor[g->state[i] * from.num_deltas + change];
    }
}

/* Writes a step of the group: the states that it came to, and what led back there. */
INLINE void write_group(const group *g, int64_t step, int64_t size, const choice *drawn) {
    /* Copies of their own: writes to the outputs could else change what is read through pointers. */
    const recall_call call = *g->call;
    const int64_t *const coordinates = g->from->coordinates;
    const int64_t num_steps = call.num_steps, first = g->first * num_steps + step;
    const int count = g->count;
    int64_t *state = (int64_t *)call.state + first * size;
    /* At the last one the same place once more. */
    int64_t *next = step ? (int64_t *)call.next_state + (first - 1) * size : state;
    for (int i = 0; i < count; i++, state += num_steps * size, next += num_steps * size) {
        const int64_t *at = coordinates + g->state[i] * size;
        memcpy(state, at, (size_t)size * sizeof *at);
        memcpy(next, at, (size_t)size * sizeof *at);
    }
    int64_t *const action = (int64_t *)call.action + first;
    float *const action_log_prob = call.action_log_prob + first;
    float *const delta_log_prob = call.delta_log_prob + first;
    uint8_t *const mask = call.mask + first;
    for (int i = 0; i < count; i++) {
        action[i * num_steps] = drawn->action[i];
        action_log_prob[i * num_steps] = drawn->action_log_prob[i];
        delta_log_prob[i * num_steps] = drawn->delta_log_prob[i];
        mask[i * num_steps] = !g->over[i];
    }
}

/* Notes which traces have left the numbers, and mends what such a one has written. */
INLINE void mend_broken(group *g, int64_t step, int64_t size, const choice *drawn) {
    for (int i = 0; i < GROUP; i += LANES) {
        const vf zero = v_set(0.0f);
        const vf sum = v_add(v_mul(v_load(drawn->action_log_prob + i), zero),
                             v_mul(v_load(drawn->delta_log_prob + i), zero));
        const uint32_t good = vm_bits(v_eq(sum, zero));
        g->broken |= (~good & ((1u << LANES) - 1)) << i;
    }
    const recall_call *call = g->call;
    for (int i = 0; g->broken && i < g->count; i++) {
        if (!(g->broken >> i & 1)) continue;
        const int64_t row = g->first + i, here = row * call->num_steps + step;
        const int64_t *start = (const int64_t *)call->start + row / call->num_traces * size;
        for (int64_t j = 0; j < size; j++) {
            ((int64_t *)call->state)[here * size + j] = start[j];
            if (step) ((int64_t *)call->next_state)[(here - 1) * size + j] = start[j];
        }
        call->action_log_prob[here] = call->delta_log_prob[here] = 0.0f;
        call->mask[here] = 0;
    }
}

/* Takes the group one step back: in short loops, so that many traces are in flight at a time. Out
 * of line: as part of a longer function it takes a third longer. */
NOINLINE void step_back(group *g, int64_t step) {
    const int64_t size = g->model->state_size;
    const int64_t action_stride = g->from->action_stride, delta_stride = g->from->delta_stride;
    const float *uniforms = g->uniforms + step * 3 * GROUP;
    choice drawn;
    if (action_stride == COUNTED && delta_stride == COUNTED)
        choose_step(g, uniforms, COUNTED, COUNTED, &drawn);
    else choose_step(g, uniforms, action_stride, delta_stride, &drawn);
    go_to(g, uniforms, &drawn);
    if (size == 2) write_group(g, step, 2, &drawn); /* a grid */
    else write_group(g, step, size, &drawn);
    mend_broken(g, step, size, &drawn);
}

/* Masks steps whose state comes again later. */
static void mask_visits(const group *g, int64_t *seen) {
    const int64_t num_steps = g->call->num_steps;
    for (int i = 0; i < g->count; i++) {
        const int64_t row = g->first + i;
        for (int64_t step = num_steps; step >= 0; step--) {
            int64_t *last = seen + g->path[step * GROUP + i];
            /* `seen` holds, for each state, the last trace that was there, counted from 1. */
            if (*last == row + 1) g->call->mask[row * num_steps + step] = 0;
            *last = row + 1;
        }
    }
}

/* Walks a group; returns how many of its first steps are finite, or -1 for a start that is no
 * state. */
static int64_t walk_group(group *g, const philox_keys *keys, int64_t *seen) {
    const recall_model *m = g->model;
    const recall_call *call = g->call;
    const int64_t size = m->state_size, last = call->num_steps - 1;
    g->broken = 0;
    memset(g->over, 0, sizeof g->over);
    memset(g->state, 0, sizeof g->state); /* beyond the group's traces, too */
    for (int i = 0; i < g->count; i++) {
        const int64_t row = g->first + i;
        const int64_t *start = (const int64_t *)call->start + row / call->num_traces * size;
        int64_t s = 0;
        for (int64_t j = 0; j < size; j++) {
            if (start[j] < 0 || start[j] >= m->cardinality[j]) return -1;
            s = s * m->cardinality[j] + start[j];
        }
        g->state[i] = s;
        memcpy((int64_t *)call->next_state + (row * call->num_steps + last) * size, start,
               (size_t)size * sizeof *start);
        if (g->path) g->path[(last + 1) * GROUP + i] = (int32_t)s;
    }
    if (call->noise_action) read_group(g);
    else draw_group(g, keys);
    int64_t finite = g->count;
    for (int64_t step = last; step >= 0; step--) {
        step_back(g, step);
        if (g->path) {
            for (int i = 0; i < g->count; i++) g->path[step * GROUP + i] = (int32_t)g->state[i];
        }
        if (step == last) finite -= count_bits(g->broken & (uint32_t)((1ull << g->count) - 1));
    }
    if (g->path) mask_visits(g, seen);
    return finite;
}

int64_t NAME(recall_look_up)(const recall_model *model, const void *memory, recall_call *call);
int64_t NAME(recall_look_up)(const recall_model *model, const void *memory, recall_call *call) {
    tables from;
    philox_keys keys;
    group g = {model, &from, call, 0, 0, NULL, NULL, 0, {0}, {0}};
    const size_t steps = (size_t)call->num_steps;
    int64_t *seen = NULL, status = OK;
    tables_layout(model, (void *)memory, &from);
    schedule_keys(&keys, (uint64_t)call->seed);
    g.uniforms = malloc(steps * 3 * GROUP * sizeof *g.uniforms);
    if (call->last_visit) {
        g.path = malloc((steps + 1) * GROUP * sizeof *g.path);
        seen = calloc((size_t)from.num_states, sizeof *seen);
    }
    if (!g.uniforms || (call->last_visit && !(g.path && seen))) status = NO_MEMORY;
    while (status == OK) {
        g.first = atomic_add(&call->next_tile, 1) * GROUP;
        if (g.first >= call->num_rows) break;
        g.count = call->num_rows - g.first < GROUP ? (int)(call->num_rows - g.first) : GROUP;
        int64_t finite = walk_group(&g, &keys, seen);
        if (finite < 0) {
            atomic_add(&call->bad_starts, 1);
            break;
        }
        atomic_add(&call->finite_rows, finite);
    }
    free(g.uniforms);
    free(g.path);
    free(seen);
    return status;
}

#endif

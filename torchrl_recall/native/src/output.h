/* What a tile writes at each step: from rows of lanes to the call's columns, a trace a row. */
#ifndef RECALL_OUTPUT_H
#define RECALL_OUTPUT_H

#include "heads.h"

/* ---- last visits ---- */

static uint64_t state_hash(const tile *t, int lane) {
    uint64_t hash = 0x9E3779B97F4A7C15u;
    for (int64_t i = 0; i < t->model->state_size; i++) {
        float value = t->state[i * TILE + lane] + 0.0f; /* minus zero is zero */
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        hash = (hash ^ bits) * 0xD6E8FEB86659FD93u;
        hash ^= hash >> 32;
    }
    return hash;
}

static double written(const recall_model *m, const void *from, int64_t i) {
    return m->is_discrete ? (double)((const int64_t *)from)[i] : (double)((const float *)from)[i];
}

/* Whether a trace's state is the one it had at a later step. */
static int is_state_of(const tile *t, int lane, int64_t later) {
    const recall_call *call = t->call;
    const int64_t size = t->model->state_size, row = t->first + lane;
    for (int64_t i = 0; i < size; i++) {
        const int is_start = later == call->num_steps;
        const int64_t at = is_start ? t->start[lane] : (row * call->num_steps + later) * size;
        const void *from = is_start ? call->start : call->state;
        if (written(t->model, from, at + i) != (double)t->state[i * TILE + lane]) return 0;
    }
    return 1;
}

/* Notes that a trace is at its state at `step`; returns whether it comes there again later. */
static int visit_again(tile *t, int lane, int64_t step) {
    const int64_t capacity = visit_capacity(t->call);
    int32_t *slots = t->visited + lane * capacity;
    for (uint64_t at = state_hash(t, lane);; at++) {
        int32_t *slot = &slots[at & (uint64_t)(capacity - 1)];
        if (*slot == 0) {
            *slot = (int32_t)(step + 1);
            return 0;
        }
        if (is_state_of(t, lane, *slot - 1)) return 1;
    }
}

/* ---- columns ---- */

/* The state of the tile's first trace at `step` of a column [rows, T, state_size]. */
static char *column_at(const tile *t, void *column, int64_t step) {
    int64_t entry = t->model->is_discrete ? sizeof(int64_t) : sizeof(float);
    return (char *)column + (t->first * t->call->num_steps + step) * t->model->state_size * entry;
}

/* Asks for the memory that this step will write, while the networks run. */
static void expect_write(const tile *t, int64_t step) {
#if defined(__GNUC__)
    const int64_t bytes = t->model->state_size * (t->model->is_discrete ? 8 : 4);
    const int64_t stride = t->call->num_steps * bytes;
    if (t->call->num_rows * stride < 1 << 18) return; /* is near, or soon will be */
    const char *state = column_at(t, t->call->state, step);
    const char *next = column_at(t, t->call->next_state, step);
    for (int lane = 0; lane < t->count; lane++) {
        for (int64_t at = 0; at < bytes; at += 64) {
            __builtin_prefetch(state + lane * stride + at, 1, 2);
            if (step) __builtin_prefetch(next + lane * stride - bytes + at, 1, 2);
        }
    }
#else
    (void)t, (void)step;
#endif
}

/* A square of rows of lanes, LANES wide, of which the first `n` are there: row r of lane j becomes
 * entry r of row j. */
#if RECALL_ISA == 512
INLINE void transpose(const float *rows, int64_t n, vf out[LANES]) {
    vf a[16], b[16];
    UNROLLED for (int i = 0; i < 16; i++) a[i] = i < n ? v_load(rows + i * TILE) : v_set(0.0f);
    /* Pairs, then fours, within quarters of vectors; then the quarters themselves. */
    UNROLLED for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4) {
        UNROLLED for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    UNROLLED for (int j = 0; j < 4; j++) {
        const vf even_low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
        const vf odd_low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        const vf even_high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        const vf odd_high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
        out[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        out[j + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        out[j + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        out[j + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}
#endif

/* Writes `n` rows of lanes as columns of `to` and of `also`, either of which may be NULL. */
static void write_floats(const float *rows, int64_t n, int count, float *to, float *also,
                         int64_t stride) {
    int lane = 0;
#if RECALL_ISA == 512
    for (; lane + LANES <= count; lane += LANES, rows += LANES) {
        for (int64_t i = 0; i < n; i += LANES) {
            vf row[LANES];
            const __mmask16 there = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffffu);
            if (there == 0xffff) transpose(rows + i * TILE, LANES, row);
            else transpose(rows + i * TILE, n - i, row);
            if (to) {
                float *at = to + lane * stride + i;
                UNROLLED for (int j = 0; j < LANES; j++)
                    _mm512_mask_storeu_ps(at + j * stride, there, row[j]);
            }
            if (also) {
                float *at = also + lane * stride + i;
                UNROLLED for (int j = 0; j < LANES; j++)
                    _mm512_mask_storeu_ps(at + j * stride, there, row[j]);
            }
        }
    }
#endif
#if RECALL_ISA
    for (; lane + 4 <= count; lane += 4, rows += 4) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {
            __m128 row[4];
            for (int j = 0; j < 4; j++) row[j] = _mm_loadu_ps(rows + (i + j) * TILE);
            _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
            for (int j = 0; j < 4; j++) {
                if (to) _mm_storeu_ps(to + (lane + j) * stride + i, row[j]);
                if (also) _mm_storeu_ps(also + (lane + j) * stride + i, row[j]);
            }
        }
        for (; i < n; i++) {
            for (int j = 0; j < 4; j++) {
                if (to) to[(lane + j) * stride + i] = rows[i * TILE + j];
                if (also) also[(lane + j) * stride + i] = rows[i * TILE + j];
            }
        }
    }
#endif
    for (; lane < count; lane++, rows++) {
        for (int64_t i = 0; i < n; i++) {
            if (to) to[lane * stride + i] = rows[i * TILE];
            if (also) also[lane * stride + i] = rows[i * TILE];
        }
    }
}

/* Traces that have left the numbers. */
INLINE int any_broken(const tile *t) {
    int any = 0;
    for (int lane = 0; lane < TILE; lane++) any |= t->broken[lane];
    return any;
}

/* Writes the tile's states to two columns; traces that have left the numbers stay at their start. */
static void write_states(const tile *t, void *to, void *also) {
    const recall_model *m = t->model;
    const int64_t size = m->state_size, stride = t->call->num_steps * size;
    if (!m->is_discrete) {
        write_floats(t->state, size, t->count, to, also, stride);
        for (int lane = 0; any_broken(t) && lane < t->count; lane++) {
            const float *start = (const float *)t->call->start + t->start[lane];
            if (!t->broken[lane]) continue;
            if (to) memcpy((float *)to + lane * stride, start, (size_t)size * 4);
            if (also) memcpy((float *)also + lane * stride, start, (size_t)size * 4);
        }
        return;
    }
    for (int lane = 0; lane < t->count; lane++) {
        const int64_t *start = (const int64_t *)t->call->start + t->start[lane];
        for (int64_t i = 0; i < size; i++) {
            int64_t value = t->broken[lane] ? start[i] : (int64_t)t->state[i * TILE + lane];
            if (to) ((int64_t *)to)[lane * stride + i] = value;
            if (also) ((int64_t *)also)[lane * stride + i] = value;
        }
    }
}

/* Writes all that the tile did at a step. */
static void write_step(tile *t, int64_t step) {
    const recall_model *m = t->model;
    /* Copies of their own: writes to the outputs could else change what is read through pointers. */
    const recall_call call = *t->call;
    const int64_t num_steps = call.num_steps, at = t->first * num_steps + step;
    const int64_t actions = m->action.size, count = t->count;
    const int is_class = !is_continuous(&m->action);
    for (int lane = 0; lane < t->lanes; lane++) t->broken[lane] |= !(t->check[lane] == 0.0f);
    write_states(t, column_at(t, call.state, step),
                 step ? column_at(t, call.next_state, step - 1) : NULL);
    float *action_log_prob = call.action_log_prob + at, *delta_log_prob = call.delta_log_prob + at;
    uint8_t *mask = call.mask + at;
    for (int lane = 0; lane < count; lane++) {
        action_log_prob[lane * num_steps] = t->action_log_prob[lane];
        delta_log_prob[lane * num_steps] = t->delta_log_prob[lane];
    }
    for (int lane = 0; lane < count; lane++)
        mask[lane * num_steps] = !(t->over[lane] | t->broken[lane]);
    if (is_class) {
        int64_t *action = (int64_t *)call.action + at;
        for (int lane = 0; lane < count; lane++) action[lane * num_steps] = t->action_class[lane];
    } else {
        float *action = (float *)call.action + at * actions;
        write_floats(t->action, actions, t->count, action, NULL, num_steps * actions);
    }
    for (int lane = 0; any_broken(t) && lane < count; lane++) {
        const int64_t here = lane * num_steps;
        if (!t->broken[lane]) continue;
        action_log_prob[here] = delta_log_prob[here] = 0.0f;
        if (!is_class)
            memset((float *)call.action + (at + here) * actions, 0, (size_t)actions * 4);
    }
    for (int lane = 0; call.last_visit && lane < count; lane++) {
        if (visit_again(t, lane, step)) mask[lane * num_steps] = 0;
    }
}

#endif

/* The way from the root of the sums down to one entry, for many draws at a time. */
#ifndef RECALL_DESCENT_H
#define RECALL_DESCENT_H

#include "choices.h"
#include "levels.h"

/* The nodes of one level with running sums, to begin below the root: the more draws, the deeper. */
#define MOST_ROOTS 4096

typedef struct {
    int64_t level, count, half; /* the next power of two is 2 * half; behind the sums lie infinities */
    union {
        double sum[MOST_ROOTS];
        uint64_t counts[MOST_ROOTS];
    } upto;
} roots;

static void find_roots(const recall_form *f, const levels *l, int64_t draws, roots *to) {
    const int64_t most = draws < MOST_ROOTS / 8 ? MOST_ROOTS / 16 : MOST_ROOTS;
    int64_t i = 0;
    for (to->level = 0; l->count[to->level] > most;) to->level++;
    to->count = l->count[to->level];
    for (to->half = 1; 2 * to->half < to->count;) to->half *= 2;
    if (f->sums == SUMS_OF_COUNTS) {
        const uint64_t *counts = l->node[to->level].counts;
        uint64_t sum = 0;
        for (; i < to->count; i++) to->upto.counts[i] = sum += counts[i];
        for (; i < 2 * to->half; i++) to->upto.counts[i] = UINT64_MAX;
    } else {
        const double *sums = l->node[to->level].sum;
        double sum = 0.0;
        for (; i < to->count; i++) to->upto.sum[i] = sum += sums[i];
        for (; i < 2 * to->half; i++) to->upto.sum[i] = INFINITY;
    }
}

/* Draws that go down side by side, so that one's loads fill another's waiting time. */
#define SIDE_BY_SIDE 32

/* The first roots whose running sums are above some numbers, and leaves in these what is left. */
INLINE void choose_roots(const levels *l, const roots *from, int64_t count, double *rest,
                         int64_t *root) {
    const double *sum = from->upto.sum, *weight = l->node[from->level].sum;
    for (int64_t i = 0; i < count; i++) root[i] = 0;
    for (int64_t step = from->half; step; step /= 2) {
        for (int64_t i = 0; i < count; i++) root[i] += sum[root[i] + step - 1] <= rest[i] ? step : 0;
    }
    for (int64_t i = 0; i < count; i++) {
        if (root[i] >= from->count || !(weight[root[i]] > 0.0)) {
            for (root[i] = from->count - 1; root[i] && !(weight[root[i]] > 0.0); root[i]--) {}
        }
        rest[i] -= root[i] ? sum[root[i] - 1] : 0.0;
    }
}

INLINE void choose_counted_roots(const roots *from, int64_t count, const uint8_t *shift,
                                 uint32_t *rest, int64_t *root) {
    const uint64_t *upto = from->upto.counts;
    for (int64_t i = 0; i < count; i++) root[i] = 0;
    for (int64_t step = from->half; step; step /= 2) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t up = (uint32_t)(upto[root[i] + step - 1] >> shift[i]) <= rest[i];
            root[i] += step & -up; /* no branch: where it goes is not to be foreseen */
        }
    }
    for (int64_t i = 0; i < count; i++)
        rest[i] -= root[i] ? (uint32_t)(upto[root[i] - 1] >> shift[i]) : 0;
}

INLINE void prefetch_children(const recall_priorities *p, const recall_form *f, const levels *l,
                              int64_t level, int64_t at) {
#if defined(__GNUC__)
    if (level) {
        __builtin_prefetch(l->node[level - 1].sum + at * FAN);
        __builtin_prefetch(l->node[level - 1].sum + at * FAN + 8);
    } else if (f->mode != MODE_RANK) {
        prefetch_value(p, at * FAN);
        if (p->is_double) prefetch_value(p, at * FAN + 8);
    }
#else
    (void)p, (void)f, (void)l, (void)level, (void)at;
#endif
}

INLINE int64_t leaves_of(const levels *l, int64_t node) {
    return l->num_leaves - node * FAN < FAN ? l->num_leaves - node * FAN : FAN;
}

/* Chooses among the sixteen leaves of a node. */
INLINE int choose_leaf(const float *weight, double *rest, double *drawn) {
    double x[FAN];
    for (int j = 0; j < FAN; j++) x[j] = weight[j];
    const int chosen = choose_weight(x, rest);
    *drawn = x[chosen];
    return chosen;
}

/* From nodes to entries, where these are floats; constants say what their weights need. */
INLINE void choose_floats(const recall_priorities *p, const form_vectors *f, const levels *l,
                          int64_t count, int is_soft, int is_power, double *rest, int64_t *at,
                          double *drawn) {
    float weight[FAN];
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = at[i] * FAN;
        float_weights(f, (const float *)p->values + first, FAN, is_soft, is_power, 0, weight);
        for (int64_t j = leaves_of(l, at[i]); j < FAN; j++) weight[j] = 0.0f;
        at[i] = first + choose_leaf(weight, rest + i, drawn + i);
    }
}

/* Goes down to a leaf for each of at most SIDE_BY_SIDE numbers in [0, sum of weights). */
static void descend(const recall_priorities *p, const recall_form *f, const levels *l,
                    const roots *from, int64_t count, double *rest, int64_t *at, double *drawn) {
    float weight[FAN];
    choose_roots(l, from, count, rest, at);
    for (int64_t i = 0; i < count; i++) prefetch_children(p, f, l, from->level, at[i]);
    for (int64_t level = from->level; level > 0; level--) {
        for (int64_t i = 0; i < count; i++) {
            at[i] = at[i] * FAN + choose_weight(l->node[level - 1].sum + at[i] * FAN, rest + i);
            prefetch_children(p, f, l, level - 1, at[i]);
        }
    }
    const form_vectors v = vectors_of(f);
    if (f->mode == MODE_RANK || p->is_double) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t first = at[i] * FAN;
            leaf_weights(p, f, first, leaves_of(l, at[i]), 0, weight);
            at[i] = first + choose_leaf(weight, rest + i, drawn + i);
        }
    } else if (f->mode == MODE_SOFT) choose_floats(p, &v, l, count, 1, 0, rest, at, drawn);
    else if (f->alpha != 1.0) choose_floats(p, &v, l, count, 0, 1, rest, at, drawn);
    else choose_floats(p, &v, l, count, 0, 0, rest, at, drawn);
}

/* The same with counts: goes to the entry of that number among those above the threshold
 * (`shift` 32) or at it (0). */
static void descend_counts(const recall_priorities *p, const recall_form *f, const levels *l,
                           const roots *from, int64_t count, uint32_t *rest, const uint8_t *shift,
                           int64_t *at) {
    choose_counted_roots(from, count, shift, rest, at);
    for (int64_t i = 0; i < count; i++) prefetch_children(p, f, l, from->level, at[i]);
    for (int64_t level = from->level; level > 0; level--) {
        for (int64_t i = 0; i < count; i++) {
            const uint64_t *child = l->node[level - 1].counts + at[i] * FAN;
            at[i] = at[i] * FAN + choose_count(child, shift[i], rest + i);
            prefetch_children(p, f, l, level - 1, at[i]);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = at[i] * FAN;
        const uint32_t classes = entry_classes(p, f, first, l->num_leaves - first) >> (shift[i] / 2);
        at[i] = first + choose_bit(classes & 0xffff, rest[i]);
    }
}

#endif

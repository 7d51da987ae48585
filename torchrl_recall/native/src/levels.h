/* Sums over the entries, in levels of sixteen children a node. */
#ifndef RECALL_LEVELS_H
#define RECALL_LEVELS_H

#include "leaves.h"

#define MAX_LEVELS 9

/* One tree: where its levels lie, and for how many leaves, entries or ranks. */
typedef struct {
    int64_t num_leaves, num_levels;
    int64_t count[MAX_LEVELS];
    union {
        double *sum;     /* of SUMS_OF_WEIGHTS */
        uint64_t *counts; /* of SUMS_OF_COUNTS: above the threshold << 32 | at it */
    } node[MAX_LEVELS];  /* up to a whole node the rest is 0 */
} levels;

static void find_levels(int64_t capacity, int64_t num_leaves, void *memory, levels *to) {
    char *node = memory;
    int64_t room = capacity, count = num_leaves;
    to->num_leaves = num_leaves;
    to->num_levels = 0;
    do {
        room = (room + FAN - 1) / FAN;
        count = (count + FAN - 1) / FAN;
        to->count[to->num_levels] = count;
        to->node[to->num_levels++].sum = (double *)(void *)node;
        node += (room + FAN - 1) / FAN * FAN * 8;
    } while (count > 1);
}

INLINE void leaf_weights(const recall_priorities *p, const recall_form *f, int64_t first, int64_t n,
                         int all_valued, float *weight) {
    if (f->mode == MODE_RANK) rank_weights(f, first, n, weight);
    else entry_weights(p, f, first, n, all_valued, weight);
}

/* Adds up nodes of level 0 from their leaves: at most RUN / FAN. */
INLINE void add_leaves(const recall_priorities *p, const recall_form *f, const levels *l,
                       int64_t from, int64_t to, int all_valued) {
    const int64_t first = from * FAN;
    const int64_t n = l->num_leaves < to * FAN ? l->num_leaves - first : to * FAN - first;
    if (f->sums == SUMS_OF_COUNTS) {
        for (int64_t i = from; i < to; i++) {
            const uint32_t classes = entry_classes(p, f, i * FAN, l->num_leaves - i * FAN);
            l->node[0].counts[i] =
                (uint64_t)count_bits(classes >> 16) << 32 | (uint64_t)count_bits(classes & 0xffff);
        }
        return;
    }
    float weight[RUN];
    leaf_weights(p, f, first, n, all_valued, weight);
    sums_of_floats(weight, to - from, l->node[0].sum + from);
}

/* Adds up nodes above level 0 from their children. */
INLINE void add_children(const recall_form *f, const levels *l, int64_t level, int64_t from,
                         int64_t to) {
    if (f->sums == SUMS_OF_COUNTS) {
        for (int64_t i = from; i < to; i++)
            SUM_OF_SIXTEEN(uint64_t, l->node[level].counts[i], l->node[level - 1].counts + i * FAN);
        return;
    }
    sums_of_doubles(l->node[level - 1].sum + from * FAN, to - from, l->node[level].sum + from);
}

/* Adds up the lowest nodes [from, to), a run at a time. */
static void build_lowest(const recall_priorities *p, const recall_form *f, const levels *l,
                         int64_t from, int64_t to, int all_valued) {
    for (int64_t i = from; i < to; i += RUN / FAN) {
        const int64_t end = i + RUN / FAN < to ? i + RUN / FAN : to;
        /* A constant, so that each is compiled without the other's work. */
        if (all_valued) add_leaves(p, f, l, i, end, 1);
        else add_leaves(p, f, l, i, end, 0);
    }
}

/* What is behind the nodes of a level, up to a whole node above: zero in both forms. */
INLINE void pad(const levels *l, int64_t level) {
    const int64_t count = l->count[level];
    if (count % FAN) memset(l->node[level].sum + count, 0, (size_t)(FAN - count % FAN) * 8);
}

/* Adds up level 1 from its node `first` on, and the levels above from `second` of level 2 on. */
static void build_above(const recall_form *f, const levels *l, int64_t first, int64_t second) {
    pad(l, 0);
    for (int64_t level = 1; level < l->num_levels; level++) {
        add_children(f, l, level, first, l->count[level]);
        pad(l, level);
        first = second;
        second /= FAN;
    }
}

/* Adds up all nodes above the leaves from `first` on. */
static void build(const recall_priorities *p, const recall_form *f, const levels *l, int64_t first) {
    const int all_valued = p->census_is_valid && p->num_valued == p->size;
    build_lowest(p, f, l, first / FAN, l->count[0], all_valued);
    build_above(f, l, first / (FAN * FAN), first / (FAN * FAN * FAN));
}

/* The lowest nodes above some entries, where these are floats; constants say what weights need. */
INLINE void add_float_nodes(const recall_priorities *p, const form_vectors *f, const levels *l,
                            const int64_t *index, int64_t count, int is_soft, int is_power) {
    float weight[FAN];
    for (int64_t i = 0, last = -1; i < count; i++) {
        const int64_t at = index[i] >> 4, n = l->num_leaves - at * FAN;
        if (index[i] < 0 || index[i] >= l->num_leaves || at == last) continue;
        float_weights(f, (const float *)p->values + at * FAN, FAN, is_soft, is_power, 0, weight);
        for (int64_t j = n; j < FAN; j++) weight[j] = 0.0f;
        sums_of_floats(weight, 1, l->node[0].sum + at);
        last = at;
    }
}

static void update_floats(const recall_priorities *p, const recall_form *f, const levels *l,
                          const int64_t *index, int64_t count) {
    const form_vectors v = vectors_of(f);
    if (f->mode == MODE_SOFT) add_float_nodes(p, &v, l, index, count, 1, 0);
    else if (f->alpha != 1.0) add_float_nodes(p, &v, l, index, count, 0, 1);
    else add_float_nodes(p, &v, l, index, count, 0, 0);
}

/* Adds up the nodes above some entries; negative indices are skipped. */
static void update(const recall_priorities *p, const recall_form *f, levels *l,
                   const int64_t *index, int64_t count) {
    int64_t level = 0;
    if (f->sums == SUMS_OF_WEIGHTS && f->mode != MODE_RANK && !p->is_double) {
        update_floats(p, f, l, index, count);
        level = 1;
    }
    for (; level < l->num_levels; level++) {
        if (level && l->count[level] <= count) {
            add_children(f, l, level, 0, l->count[level]);
            continue;
        }
        int64_t last = -1;
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = index[i] >> (4 * (level + 1));
            if (index[i] < 0 || index[i] >= l->num_leaves || at == last) continue;
            if (level) add_children(f, l, level, at, at + 1);
            else add_leaves(p, f, l, at, at + 1, 0);
            last = at;
        }
    }
}

INLINE double sum_of_weights(const levels *l) { return l->node[l->num_levels - 1].sum[0]; }
INLINE int64_t num_above(const levels *l) {
    return (int64_t)(l->node[l->num_levels - 1].counts[0] >> 32);
}
INLINE int64_t num_tied(const levels *l) {
    return (int64_t)(l->node[l->num_levels - 1].counts[0] & 0xffffffffu);
}

#endif

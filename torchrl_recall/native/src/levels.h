/* Sums over the entries, in levels of sixteen children a node, and the way down to one entry. */
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

/* The order of additions is the same wherever a sum is formed. */
#define SUM_OF_SIXTEEN(type, result, x)                                                           \
    do {                                                                                          \
        type a[8];                                                                                \
        for (int k = 0; k < 8; k++) a[k] = (type)(x)[k] + (type)(x)[k + 8];                       \
        for (int k = 0; k < 4; k++) a[k] += a[k + 4];                                             \
        result = (a[0] + a[2]) + (a[1] + a[3]);                                                   \
    } while (0)

INLINE void leaf_weights(const recall_priorities *p, const recall_form *f, int64_t first, int64_t n,
                         float *weight) {
    if (f->mode == MODE_RANK) rank_weights(f, first, n, weight);
    else entry_weights(p, f, first, n, weight);
}

/* Adds up nodes of level 0 from their leaves: at most RUN / FAN. */
INLINE void add_leaves(const recall_priorities *p, const recall_form *f, const levels *l,
                       int64_t from, int64_t to) {
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
    leaf_weights(p, f, first, n, weight);
    for (int64_t i = from; i < to; i++)
        SUM_OF_SIXTEEN(double, l->node[0].sum[i], weight + (i - from) * FAN);
}

/* Adds up a node above level 0 from its children. */
INLINE void add_children(const recall_form *f, const levels *l, int64_t level, int64_t i) {
    if (f->sums == SUMS_OF_COUNTS)
        SUM_OF_SIXTEEN(uint64_t, l->node[level].counts[i], l->node[level - 1].counts + i * FAN);
    else SUM_OF_SIXTEEN(double, l->node[level].sum[i], l->node[level - 1].sum + i * FAN);
}

/* Adds up all nodes above the leaves from `first` on. */
static void build(const recall_priorities *p, const recall_form *f, levels *l, int64_t first) {
    for (int64_t level = 0; level < l->num_levels; level++) {
        const int64_t count = l->count[level];
        first /= FAN;
        if (level) {
            for (int64_t i = first; i < count; i++) add_children(f, l, level, i);
        } else {
            for (int64_t i = first; i < count; i += RUN / FAN)
                add_leaves(p, f, l, i, i + RUN / FAN < count ? i + RUN / FAN : count);
        }
        /* Zero in both forms. */
        if (count % FAN) memset(l->node[level].sum + count, 0, (size_t)(FAN - count % FAN) * 8);
    }
}

/* Adds up the nodes above some entries; negative indices are skipped. */
static void update(const recall_priorities *p, const recall_form *f, levels *l,
                   const int64_t *index, int64_t count) {
    for (int64_t level = 0; level < l->num_levels; level++) {
        if (level && l->count[level] <= count) {
            for (int64_t i = 0; i < l->count[level]; i++) add_children(f, l, level, i);
            continue;
        }
        int64_t last = -1;
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = index[i] >> (4 * (level + 1));
            if (index[i] < 0 || index[i] >= l->num_leaves || at == last) continue;
            if (level) add_children(f, l, level, at);
            else add_leaves(p, f, l, at, at + 1);
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

/* Four weights side by side; sums of those before each; how many of the last three sums are at most
 * x. Where it goes is not to be foreseen, so there are no branches. */
#if RECALL_ISA
typedef __m256d four;
INLINE four load_four(const double *x) { return _mm256_loadu_pd(x); }
INLINE four every_fourth(const double *x) { return _mm256_set_pd(x[12], x[8], x[4], x[0]); }
INLINE four add_four(four a, four b) { return _mm256_add_pd(a, b); }
INLINE int steps_up(four weight, double x, double *sum) {
    const __m256d zero = _mm256_setzero_pd();
    const __m256d by_one = _mm256_blend_pd(_mm256_permute4x64_pd(weight, 0x90), zero, 1);
    const __m256d by_two = _mm256_blend_pd(_mm256_permute4x64_pd(weight, 0x40), zero, 3);
    const __m256d by_three = _mm256_blend_pd(_mm256_permute4x64_pd(weight, 0x00), zero, 7);
    const __m256d sums = _mm256_add_pd(_mm256_add_pd(by_one, by_two), by_three);
    const __m256d up = _mm256_cmp_pd(sums, _mm256_set1_pd(x), _CMP_LE_OQ);
    _mm256_storeu_pd(sum, sums);
    return __builtin_popcount((unsigned)_mm256_movemask_pd(up) & 14);
}
#else
typedef struct { double x[4]; } four;
INLINE four load_four(const double *x) { four r = {{x[0], x[1], x[2], x[3]}}; return r; }
INLINE four every_fourth(const double *x) { four r = {{x[0], x[4], x[8], x[12]}}; return r; }
INLINE four add_four(four a, four b) {
    four r = {{a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3]}};
    return r;
}
INLINE int steps_up(four weight, double x, double *sum) {
    sum[0] = 0.0;
    sum[1] = weight.x[0];
    sum[2] = weight.x[1] + weight.x[0];
    sum[3] = (weight.x[2] + weight.x[1]) + weight.x[0];
    return (sum[1] <= x) + (sum[2] <= x) + (sum[3] <= x);
}
#endif

/* Chooses among sixteen weights by a number in [0, their sum), and leaves in it what is left, to
 * rounding below the weight chosen. First a group, every fourth weight, then one of it. */
INLINE int choose_weight(const double *x, double *rest) {
    double sum[4];
    const four group = add_four(add_four(load_four(x), load_four(x + 4)),
                                add_four(load_four(x + 8), load_four(x + 12)));
    const int g = steps_up(group, *rest, sum);
    double left = *rest - sum[g];
    const int k = steps_up(every_fourth(x + g), left, sum);
    left -= sum[k];
    int chosen = g + 4 * k;
    if (!(x[chosen] > 0.0)) {
        /* Rounding has led past the last weight: any that is there is as good. */
        for (chosen = FAN - 1; chosen && !(x[chosen] > 0.0); chosen--) {}
    }
    *rest = left > 0.0 ? left : 0.0;
    return chosen;
}

/* Chooses among sixteen counts by a number below their sum, in the same way. */
INLINE int choose_count(const uint32_t *count, uint32_t *rest) {
    uint32_t group[4];
    for (int j = 0; j < 4; j++)
        group[j] = (count[j] + count[j + 4]) + (count[j + 8] + count[j + 12]);
    uint32_t sum[4] = {0, group[0], group[0] + group[1], group[0] + group[1] + group[2]};
    const int g = (sum[1] <= *rest) + (sum[2] <= *rest) + (sum[3] <= *rest);
    *rest -= sum[g];
    sum[1] = count[g];
    sum[2] = sum[1] + count[g + 4];
    sum[3] = sum[2] + count[g + 8];
    const int k = (sum[1] <= *rest) + (sum[2] <= *rest) + (sum[3] <= *rest);
    *rest -= sum[k];
    return g + 4 * k;
}

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

/* Goes down to a leaf for each of at most SIDE_BY_SIDE numbers in [0, sum of weights). */
static void descend(const recall_priorities *p, const recall_form *f, const levels *l,
                    const roots *from, int64_t count, double *rest, int64_t *at, double *drawn) {
    double x[FAN];
    choose_roots(l, from, count, rest, at);
    for (int64_t i = 0; i < count; i++) prefetch_children(p, f, l, from->level, at[i]);
    for (int64_t level = from->level; level > 0; level--) {
        for (int64_t i = 0; i < count; i++) {
            at[i] = at[i] * FAN + choose_weight(l->node[level - 1].sum + at[i] * FAN, rest + i);
            prefetch_children(p, f, l, level - 1, at[i]);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float weight[FAN];
        const int64_t n = leaves_of(l, at[i]);
        leaf_weights(p, f, at[i] * FAN, n, weight);
        for (int j = 0; j < FAN; j++) x[j] = weight[j];
        const int chosen = choose_weight(x, rest + i);
        at[i] = at[i] * FAN + chosen;
        drawn[i] = x[chosen];
    }
}

/* The same with counts: goes to the entry of that number among those above the threshold
 * (`shift` 32) or at it (0). */
static void descend_counts(const recall_priorities *p, const recall_form *f, const levels *l,
                           const roots *from, int64_t count, uint32_t *rest, const uint8_t *shift,
                           int64_t *at) {
    uint32_t x[FAN];
    choose_counted_roots(from, count, shift, rest, at);
    for (int64_t i = 0; i < count; i++) prefetch_children(p, f, l, from->level, at[i]);
    for (int64_t level = from->level; level > 0; level--) {
        for (int64_t i = 0; i < count; i++) {
            const uint64_t *child = l->node[level - 1].counts + at[i] * FAN;
            for (int j = 0; j < FAN; j++) x[j] = (uint32_t)(child[j] >> shift[i]);
            at[i] = at[i] * FAN + choose_count(x, rest + i);
            prefetch_children(p, f, l, level - 1, at[i]);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = at[i] * FAN;
        const uint32_t classes = entry_classes(p, f, first, l->num_leaves - first) >> (shift[i] / 2);
        for (int j = 0; j < FAN; j++) x[j] = classes >> j & 1;
        at[i] = first + choose_count(x, rest + i);
    }
}

#endif

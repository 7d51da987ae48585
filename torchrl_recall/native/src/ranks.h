/* The order of MODE_RANK: entries by falling value, and the runs of equal ones. */
#ifndef RECALL_RANKS_H
#define RECALL_RANKS_H

#include <stdlib.h>

#include "levels.h"

#define DIGIT 11 /* bits that are sorted by at a time */
#define DIGITS(p) ((p)->is_double ? 6 : 3)

/* Unsigned keys that rise where values fall. The two zeros are one. */
INLINE uint64_t rank_key(const recall_priorities *p, int64_t i) {
    if (p->is_double) {
        const double x = ((const double *)p->values)[i] + 0.0;
        uint64_t bits;
        memcpy(&bits, &x, sizeof bits);
        return bits >> 63 ? bits : ~bits & ~((uint64_t)1 << 63);
    }
    const float x = ((const float *)p->values)[i] + 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? bits : ~bits & ~((uint32_t)1 << 31);
}

/* Sorts the entries that may be drawn, by digits from the lowest; equal ones stay in their order. */
static int64_t sort_entries(recall_priorities *p) {
    const int64_t n = p->num_drawable, digits = DIGITS(p), mask = (1 << DIGIT) - 1;
    uint32_t *start = calloc((size_t)digits << DIGIT, sizeof *start);
    if (!start) return NO_MEMORY;
    for (int64_t i = 0; i < p->size; i++) {
        const double value = value_at(p, i);
        if (!(value == value)) continue;
        const uint64_t key = rank_key(p, i);
        for (int64_t d = 0; d < digits; d++)
            start[(d << DIGIT) + (int64_t)(key >> (d * DIGIT) & (uint64_t)mask)]++;
    }
    int is_first = 1;
    for (int64_t d = 0; d < digits; d++) {
        uint32_t *at = start + (d << DIGIT), sum = 0;
        int is_same = 0;
        for (int64_t j = 0; j <= mask; j++) {
            const uint32_t count = at[j];
            is_same |= count == (uint32_t)n;
            at[j] = sum;
            sum += count;
        }
        /* The first pass also makes the list. */
        if (is_same && !(is_first && d == digits - 1)) continue;
        uint32_t *to = p->spare;
        if (is_first) {
            for (int64_t i = 0; i < p->size; i++) {
                const double value = value_at(p, i);
                if (!(value == value)) continue;
                to[at[rank_key(p, i) >> (d * DIGIT) & (uint64_t)mask]++] = (uint32_t)i;
            }
        } else {
            for (int64_t i = 0; i < n; i++) {
                if (i + 32 < n) prefetch_value(p, p->order[i + 32]);
                const uint32_t entry = p->order[i];
                to[at[rank_key(p, entry) >> (d * DIGIT) & (uint64_t)mask]++] = entry;
            }
        }
        is_first = 0;
        p->spare = p->order;
        p->order = to;
    }
    free(start);
    memset(p->changed, 0, (size_t)(p->capacity + 63) / 64 * 8);
    p->num_changed = 0;
    p->num_ordered = n;
    p->order_is_valid = 1;
    return OK;
}

/* Notes that an entry has another value than when it was ordered. */
INLINE void note_change(recall_priorities *p, int64_t entry) {
    uint64_t *word = p->changed + entry / 64, bit = (uint64_t)1 << entry % 64;
    p->num_changed += !(*word & bit);
    *word |= bit;
    /* Some are put in their new places; many are sorted together with all the others. */
    if (p->num_changed > p->num_ordered / 64) p->order_is_valid = 0;
}

typedef struct {
    uint64_t key;
    uint32_t entry;
} moved;

static int compare_moved(const void *a, const void *b) {
    const moved *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return x->entry < y->entry ? -1 : x->entry > y->entry;
}

/* Puts the entries that have changed in their new places, as sorting all would. */
static int64_t sort_changed(recall_priorities *p) {
    moved *changed = malloc((size_t)p->num_changed * sizeof *changed);
    if (!changed) return NO_MEMORY;
    int64_t n = 0, kept = 0, from = 0;
    for (int64_t i = 0; i < p->num_ordered; i++) {
        const uint32_t entry = p->order[i];
        p->order[kept] = entry;
        kept += !(p->changed[entry / 64] >> entry % 64 & 1);
    }
    for (int64_t word = 0; word < (p->capacity + 63) / 64; word++) {
        if (!p->changed[word]) continue;
        for (int64_t i = word * 64; i < word * 64 + 64; i++) {
            if (!(p->changed[word] >> i % 64 & 1) || i >= p->size) continue;
            const double value = value_at(p, i);
            if (!(value == value)) continue;
            changed[n].key = rank_key(p, i);
            changed[n++].entry = (uint32_t)i;
        }
        p->changed[word] = 0;
    }
    qsort(changed, (size_t)n, sizeof *changed, compare_moved);
    for (int64_t i = 0; i < n; i++) {
        int64_t low = from, high = kept;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            const moved there = {rank_key(p, p->order[middle]), p->order[middle]};
            if (compare_moved(&there, changed + i) < 0) low = middle + 1;
            else high = middle;
        }
        memcpy(p->spare + from + i, p->order + from, (size_t)(low - from) * sizeof *p->order);
        p->spare[low + i] = changed[i].entry;
        from = low;
    }
    memcpy(p->spare + from + n, p->order + from, (size_t)(kept - from) * sizeof *p->order);
    free(changed);
    uint32_t *order = p->spare;
    p->spare = p->order;
    p->order = order;
    p->num_ordered = kept + n;
    p->num_changed = 0;
    return OK;
}

/* The first of the ranks from `from` up to `to` whose value is below `value` (or at most it). */
static int64_t first_below(const recall_priorities *p, int64_t from, int64_t to, double value,
                           int or_equal) {
    while (from < to) {
        const int64_t middle = from + (to - from) / 2;
        const double x = value_at(p, p->order[middle]);
        if (x < value || (or_equal && x == value)) to = middle;
        else from = middle + 1;
    }
    return from;
}

/* The sum of the weights of the ranks [from, to), without differences of larger sums. */
static double sum_of_ranks(const recall_priorities *p, const levels *l, int64_t from, int64_t to) {
    float weight[FAN];
    double sum = 0.0;
    if (to - from < FAN) {
        rank_weights(&p->form, from, to - from, weight);
        for (int64_t j = 0; j < to - from; j++) sum += weight[j];
        return sum;
    }
    const int64_t ahead = (FAN - from % FAN) % FAN, behind = to % FAN;
    if (ahead) rank_weights(&p->form, from, ahead, weight);
    for (int64_t j = 0; j < ahead; j++) sum += weight[j];
    from += ahead;
    to -= behind;
    if (behind) rank_weights(&p->form, to, behind, weight);
    for (int64_t j = 0; j < behind; j++) sum += weight[j];
    for (int64_t level = 0; from < to; level++) {
        from /= FAN;
        to /= FAN;
        for (; from < to && (from % FAN || to - from < FAN); from++)
            sum += l->node[level].sum[from];
        for (; from < to && to % FAN; to--) sum += l->node[level].sum[to - 1];
    }
    return sum;
}

/* Where the run of equal values around a rank begins and ends. */
static int64_t run_begin(const recall_priorities *p, int64_t rank) {
    const double value = value_at(p, p->order[rank]);
    int64_t step = 1;
    while (rank - step >= 0 && value_at(p, p->order[rank - step]) == value) step *= 2;
    if (step == 1) return rank;
    return first_below(p, rank - step < 0 ? 0 : rank - step, rank - step / 2, value, 1);
}

static int64_t run_end(const recall_priorities *p, int64_t rank) {
    const double value = value_at(p, p->order[rank]);
    int64_t step = 1;
    while (rank + step < p->num_ranks && value_at(p, p->order[rank + step]) == value) step *= 2;
    if (step == 1) return rank + 1;
    return first_below(p, rank + step / 2,
                       rank + step < p->num_ranks ? rank + step : p->num_ranks, value, 0);
}

/* The weight of each of the ranks [from, to), which share a value: the mean over theirs. */
static double mean_of_ranks(const recall_priorities *p, const levels *l, int64_t from, int64_t to) {
    return sum_of_ranks(p, l, from, to) / (double)(to - from);
}

#endif

/* A refresh: values are copied piece by piece, and what follows from a piece is worked out while it
 * is in the cache: memory is read and written once. What is not to be foreseen, `prepare` does. */
#ifndef RECALL_REFRESH_H
#define RECALL_REFRESH_H

#include "sieve.h"
#include "writes.h"

#define PIECE 1024            /* entries: whole nodes of level 1 that fit the first cache */
#define STREAMED (16ll << 20) /* bytes of values that no cache is expected to keep */

/* Writes past the caches, which would fetch first what is overwritten; `to` is aligned to 64. */
INLINE void stream(void *to, const void *from, int64_t bytes) {
    int64_t i = 0;
#if RECALL_ISA == 512
    for (; i + 64 <= bytes; i += 64)
        _mm512_stream_si512((void *)((char *)to + i), vi_load((const char *)from + i));
#elif RECALL_ISA == 256
    for (; i + 32 <= bytes; i += 32)
        _mm256_stream_si256((__m256i *)(void *)((char *)to + i), vi_load((const char *)from + i));
#endif
    memcpy((char *)to + i, (const char *)from + i, (size_t)(bytes - i));
}

/* Only then other threads see all of it, before whatever is written later. */
INLINE void end_stream(void) {
#if RECALL_ISA
    _mm_sfence();
#endif
}

#define COPY(to_type, from_type)                                                                  \
    do {                                                                                          \
        to_type *into = (to_type *)to;                                                            \
        const from_type *values = (const from_type *)from, lowest = (from_type)none;              \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const to_type x = (to_type)values[i];                                                 \
            const int is_bad = !(x - x == 0), is_none = !is_bad & (values[i] == lowest);          \
            into[i] = is_bad ? (to_type)NAN : is_none ? -(to_type)INFINITY : x;                   \
            bad += is_bad;                                                                        \
            none_yet += is_none;                                                                  \
        }                                                                                         \
    } while (0)

/* Stores n values; returns how many were not finite, and how many stand for none yet. */
static int64_t copy_values(void *to, int64_t to_double, const void *from, int64_t from_double,
                           int64_t n, double none, int64_t *missing) {
    int32_t bad = 0, none_yet = 0;
    if (to_double && from_double) COPY(double, double);
    else if (to_double) COPY(double, float);
    else if (from_double) COPY(float, double);
    else COPY(float, float);
    *missing = none_yet;
    return bad;
}

int64_t NAME(recall_refresh)(recall_priorities *, const void *, int64_t, int64_t, double);
int64_t NAME(recall_refresh)(recall_priorities *p, const void *values, int64_t is_double,
                             int64_t count, double none) {
    if (count > p->capacity) return OUT_OF_RANGE;
    const int64_t bytes = p->is_double ? 8 : 4;
    const int with_census = count >= p->size && !p->has_min_value;
    /* In this mode weights mostly refer to the same power of two as before. */
    const int with_sums = with_census && p->mode == MODE_PER && p->nodes_are_valid &&
                          !p->num_ranks && p->form.sums == SUMS_OF_WEIGHTS;
    const int streamed = count * bytes > STREAMED && (uintptr_t)p->values % 64 == 0;
    int64_t refused = 0, missing, num_added = 0; /* entries of which level 1 is added up */
    double buffer[PIECE];
    recall_priorities part = *p; /* of the piece at hand, with the census so far */
    levels all, own;
    sieve s = {0};
    find_levels(p->capacity, p->size, p->nodes, &all);
    if (with_census) open_sieve(p, values, is_double, &s);
    const int was_sieved = s.value != NULL;
    begin_census(&part);
    for (int64_t start = 0; start < count; start += PIECE) {
        const int64_t n = count - start < PIECE ? count - start : PIECE;
        const int64_t stored = p->size - start < n ? p->size - start : n;
        char *place = (char *)p->values + start * bytes;
        part.values = streamed ? (void *)buffer : (void *)place;
        const char *from = (const char *)values + start * (is_double ? 8 : 4);
        const int64_t bad =
            copy_values(part.values, p->is_double, from, is_double, n, none, &missing);
        if (streamed) stream(place, buffer, n * bytes);
        refused += bad;
        if (!with_census || stored <= 0) continue; /* those behind are not stored yet */
        if (stored < n) {
            take_in(&part, 0, stored);
        } else {
            part.num_drawable += n - bad;
            part.num_valued += n - bad - missing;
            if (needs_largest(p)) find_largest(&part, 0, n, -INFINITY);
        }
        own.num_leaves = stored;
        own.node[0].sum = all.node[0].sum + start / FAN;
        if (s.value) sift(&part, &own, start, stored, &s);
        if (!with_sums) continue;
        build_lowest(&part, &p->form, &own, 0, (stored + FAN - 1) / FAN, !bad && !missing);
        if (stored < PIECE) continue;
        own.node[1].sum = all.node[1].sum + start / (FAN * FAN);
        add_children(&p->form, &own, 1, 0, PIECE / (FAN * FAN));
        num_added = start + PIECE;
    }
    if (streamed) end_stream();
    part.values = p->values;
    *p = part;
    p->census_is_valid = with_census;
    p->threshold_is_valid = p->band_is_valid = p->eligible_is_valid = 0;
    p->order_is_valid = p->least_is_valid = 0;
    /* Sums over ranks stay; others are new, and hold if the form is still theirs. */
    p->nodes_are_valid = with_sums || (p->nodes_are_valid && p->num_ranks && !was_sieved);
    /* The number of the best is that of all only where all may be drawn. */
    if (s.value && p->num_drawable == p->size && p->num_valued && find_sieved(p, &all, &s)) {
        p->form = form_of(p);
        p->num_ranks = 0;
        p->nodes_are_valid = 1;
    }
    if (p->nodes_are_valid && !p->num_ranks)
        build_above(&p->form, &all, num_added / (FAN * FAN), 0);
    close_sieve(&s);
    return refused;
}

#endif

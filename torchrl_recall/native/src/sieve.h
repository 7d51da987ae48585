/* Mode "top" while values are copied: what is surely kept is counted, the few that may be are put
 * aside, so that threshold and counts follow without another look at all. */
#ifndef RECALL_SIEVE_H
#define RECALL_SIEVE_H

#include "threshold.h"

#define SAMPLE (4 * FEW) /* values, at most */

typedef struct {
    float high, low;    /* between these, or at them, lies the threshold: a sample says so */
    int64_t num_above;  /* entries above `high` */
    int64_t num_aside, room;
    float *value;       /* of those put aside, NULL: no sieve */
    uint32_t *entry;
} sieve;

static void close_sieve(sieve *s) {
    free(s->value);
    s->value = NULL;
}

/* Looks where the threshold of all new values will be; the sample is theirs. */
static void open_sieve(const recall_priorities *p, const void *values, int64_t is_double,
                       sieve *s) {
    float sample[SAMPLE + LANES], few[SAMPLE + LANES];
    int64_t m = 0, counts[4];
    uint64_t place = 0;
    const int64_t part = p->size / 64, size = part < FEW ? FEW : part < SAMPLE ? part : SAMPLE;
    if (p->mode != MODE_TOP || p->is_double || p->size <= FEW) return;
    if (p->num_best < 1 || p->num_best > p->size) return;
    for (int64_t i = 0; i < size; i++) {
        const int64_t at = next_place(&place, p->size);
        const float x =
            is_double ? (float)((const double *)values)[at] : ((const float *)values)[at];
        if (x - x == 0.0f) sample[m++] = x;
    }
    if (m < FEW) return;
    const double share = ((double)p->num_best - 0.5) / (double)p->size;
    const double deviation = sqrt(share * (1.0 - share));
    s->high = INFINITY;
    s->low = -INFINITY;
    memcpy(few, sample, FEW * sizeof *few);
    /* Roughly by the first, so that only those between have to be put in order. */
    bracket_float(few, FEW, share * FEW, 4.5 * sqrt(FEW) * deviation + 1.0, &s->high, &s->low);
    split_float(sample, m, s->high, s->low, counts, few, SAMPLE + LANES);
    const double middle = share * (double)m - (double)(counts[ABOVE] + counts[AT_HIGH]);
    const double spread = 3.0 * sqrt((double)m) * deviation + 1.0;
    const int64_t aside = bracket_float(few, counts[BETWEEN], middle, spread, &s->high, &s->low);
    /* As many as the sample lets expect, a quarter more, and a piece. */
    s->room = (int64_t)(1.25 * (double)aside / (double)(m + 1) * (double)p->size) + 2 * FEW;
    /* In one, as freed memory of one size is had back without page faults. It also goes without. */
    s->value = malloc((size_t)s->room * (sizeof *s->value + sizeof *s->entry));
    if (s->value) s->entry = (uint32_t *)(void *)(s->value + s->room);
}

/* Takes in the values of a piece that starts at entry `start`, all of a node but at the end. */
static void sift(const recall_priorities *part, const levels *l, int64_t start, int64_t n,
                 sieve *s) {
    if (s->num_aside + n + LANES > s->room) { /* the sample misled */
        close_sieve(s);
        return;
    }
    const vf high = v_set(s->high), low = v_set(s->low);
    const float *values = (const float *)part->values;
    float *value = s->value + s->num_aside;
    uint32_t *entry = s->entry + s->num_aside;
    uint64_t *counts = l->node[0].counts;
    int64_t num_above = 0;
    for (int64_t first = 0; first < n; first += FAN) {
        const uint32_t stored = n - first < FAN ? (1u << (n - first)) - 1 : 0xffff;
        uint32_t above = 0, inside = 0;
        for (int j = 0; j < FAN; j += LANES) {
            const vf v = v_load(values + first + j);
            above |= vm_bits(v_lt(high, v)) << j;
            inside |= vm_bits(v_le(low, v)) << j;
        }
        above &= stored;
        inside &= stored & ~above;
        counts[first / FAN] = (uint64_t)count_bits(above) << 32;
        num_above += count_bits(above);
#if RECALL_ISA == 512
        const vi number = _mm512_add_epi32(
            vi_set((uint32_t)(start + first)),
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
        v_store(value, _mm512_maskz_compress_ps((vm)inside, v_load(values + first)));
        vi_store(entry, _mm512_maskz_compress_epi32((vm)inside, number));
        value += count_bits(inside);
        entry += count_bits(inside);
#else
        for (int64_t i = first; inside; i++, inside >>= 1) {
            *value = values[i];
            *entry = (uint32_t)(start + i);
            value += inside & 1;
            entry += inside & 1;
        }
#endif
    }
    s->num_aside = value - s->value;
    s->num_above += num_above;
}

/* Finds the threshold among what was put aside, and counts that too; returns whether it is there. */
static int find_sieved(recall_priorities *p, const levels *l, const sieve *s) {
    int64_t counts[4] = {s->num_above, 0, 0, 0};
    const int64_t k = p->num_best - 1;
    if (k < s->num_above || k >= s->num_above + s->num_aside) return 0;
    float *between = malloc((size_t)(s->num_aside + 1) * sizeof *between);
    if (!between) return 0;
    for (int64_t i = 0; i < s->num_aside; i++) {
        const float v = s->value[i];
        between[counts[BETWEEN]] = v;
        counts[BETWEEN] += (v < s->high) & (v > s->low);
        counts[AT_HIGH] += v == s->high;
        counts[AT_LOW] += (v < s->high) & (v == s->low);
    }
    begin_threshold(p);
    if (end_threshold(p, narrow_float(p, counts, s->high, s->low, between, p->size, k)) != OK)
        return 0;
    const float threshold = (float)p->threshold;
    uint64_t *counted = l->node[0].counts;
    for (int64_t i = 0; i < s->num_aside; i++) {
        const float v = s->value[i];
        counted[s->entry[i] / FAN] += (uint64_t)(v > threshold) << 32 | (uint64_t)(v == threshold);
    }
    return 1;
}

#endif

/* Draws by value. */
#ifndef RECALL_DRAWS_H
#define RECALL_DRAWS_H

#include "descent.h"
#include "refresh.h"

/* The weight of one entry. */
static double weight_of(const recall_priorities *p, const levels *l, int64_t entry) {
    const recall_form *f = &p->form;
    const double value = value_at(p, entry);
    if (!(value >= f->least)) return 0.0;
    if (f->sums == SUMS_OF_COUNTS)
        return value > f->threshold ? 1.0 : value == f->threshold ? tied_share(p) : 0.0;
    if (f->mode == MODE_RANK) {
        const int64_t from = first_below(p, 0, p->num_ranks, value, 1);
        return mean_of_ranks(p, l, from, run_end(p, from));
    }
    float weight[FAN];
    /* All of its node: a vector from the entry on might end behind the values. */
    entry_weights(p, f, entry / FAN * FAN, FAN, 0, weight);
    return weight[entry % FAN];
}

/* The least weight of all that may be drawn, and the least above 0. */
static void find_least(recall_priorities *p, const levels *l) {
    const recall_form *f = &p->form;
    double least = INFINITY, positive = INFINITY;
    if (f->sums == SUMS_OF_COUNTS) {
        const double share = tied_share(p);
        positive = num_tied(l) ? share : 1.0;
        least = num_above(l) + num_tied(l) < num_eligible(p) ? 0.0 : positive;
    } else if (f->mode == MODE_RANK) {
        /* A large exponent makes the last weights 0. */
        for (int64_t to = p->num_ranks; to > 0 && positive == INFINITY;) {
            const int64_t from = run_begin(p, to - 1);
            const double weight = mean_of_ranks(p, l, from, to);
            if (to == p->num_ranks) least = weight;
            if (weight > 0.0) positive = weight;
            to = from;
        }
    } else {
        float weight[RUN];
        for (int64_t first = 0; first < p->size; first += RUN) {
            const int64_t n = p->size - first < RUN ? p->size - first : RUN;
            entry_weights(p, f, first, n, 0, weight);
            for (int64_t j = 0; j < n; j++) {
                if (weight[j] < least && value_at(p, first + j) >= f->least) least = weight[j];
                if (weight[j] > 0.0f && weight[j] < positive) positive = weight[j];
            }
        }
    }
    p->least_weight = least;
    p->least_positive_weight = positive;
    p->least_is_valid = 1;
}

typedef struct {
    double share, total, even; /* of a tied entry; of all weights; each entry's uniform part */
} mixture;

/* With a uniform share, weights become probabilities. */
INLINE double mixed(const recall_priorities *p, const mixture *m, double weight) {
    return p->uniform_share > 0.0 ? (1.0 - p->uniform_share) * weight / m->total + m->even : weight;
}

static mixture mixture_of(const recall_priorities *p, const levels *l) {
    mixture m;
    m.share = p->form.sums == SUMS_OF_COUNTS ? tied_share(p) : 1.0;
    m.total = p->form.sums == SUMS_OF_COUNTS
        ? (double)num_above(l) + (double)num_tied(l) * m.share
        : sum_of_weights(l);
    /* Never 0 by rounding: it may be the least probability, by which others are divided. */
    m.even = fmax(p->uniform_share / (double)num_eligible(p), DBL_MIN);
    return m;
}

/* Numbers in [0, 1) become entries above the threshold, or at it with the weight `share`. */
static void draw_counted(const recall_priorities *p, const recall_form *f, const levels *l,
                         const roots *from, double share, int64_t count,
                         const double *uniform, int64_t *entry, double *drawn) {
    uint32_t rest[SIDE_BY_SIDE];
    uint8_t shift[SIDE_BY_SIDE];
    const double above = (double)num_above(l), tied = (double)num_tied(l);
    for (int64_t i = 0; i < count; i++) {
        const double x = uniform[i] * (above + tied * share);
        const int is_tied = tied > 0.0 && x >= above;
        const double number = is_tied ? (x - above) / share : x, last = is_tied ? tied : above;
        rest[i] = (uint32_t)(number < last ? number : last - 1.0);
        shift[i] = is_tied ? 0 : 32;
        drawn[i] = is_tied ? share : 1.0;
    }
    descend_counts(p, f, l, from, count, rest, shift, entry);
}

/* Numbers in [0, 1) become entries that may be drawn. */
static void draw_evenly(const recall_priorities *p, const levels *l, const roots *from,
                        int64_t count, const double *uniform, int64_t *entry) {
    double drawn[SIDE_BY_SIDE];
    if (num_eligible(p) < p->size) {
        draw_counted(p, &p->eligible_form, l, from, 1.0, count, uniform, entry, drawn);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        entry[i] = (int64_t)(uniform[i] * (double)p->size);
        if (entry[i] >= p->size) entry[i] = p->size - 1;
    }
}

/* Numbers in [0, 1) become entries by their weights. */
static void draw_weighted(const recall_priorities *p, const levels *l, const roots *from,
                          const mixture *m, int64_t count, double *uniform, int64_t *entry,
                          double *drawn) {
    if (p->form.sums == SUMS_OF_COUNTS) {
        draw_counted(p, &p->form, l, from, m->share, count, uniform, entry, drawn);
        return;
    }
    for (int64_t i = 0; i < count; i++) uniform[i] *= m->total;
    descend(p, &p->form, l, from, count, uniform, entry, drawn);
    for (int64_t i = 0; i < count && p->num_ranks; i++) {
        const int64_t from = run_begin(p, entry[i]), to = run_end(p, entry[i]);
        const int64_t among = (int64_t)(uniform[i] / drawn[i] * (double)(to - from));
        if (to - from > 1) drawn[i] = mean_of_ranks(p, l, from, to);
        entry[i] = p->order[from + (among < to - from ? among : to - from - 1)];
    }
}

int64_t NAME(recall_draw)(recall_priorities *, const double *, int64_t, double, int64_t *, float *);
int64_t NAME(recall_draw)(recall_priorities *p, const double *uniform, int64_t count, double beta,
                          int64_t *entry, float *importance) {
    levels l, even_levels;
    roots from, even_from;
    const int64_t status = prepare(p);
    if (status != OK) return status;
    find_levels(p->capacity, p->num_ranks ? p->num_ranks : p->size, p->nodes, &l);
    find_roots(&p->form, &l, count, &from);
    if (p->uniform_share > 0.0 && num_eligible(p) < p->size) {
        find_levels(p->capacity, p->size, p->eligible, &even_levels);
        find_roots(&p->eligible_form, &even_levels, count, &even_from);
    }
    if (importance && !p->least_is_valid) find_least(p, &l);
    const mixture m = mixture_of(p, &l);
    const double even_share = p->uniform_share;
    const double least = even_share > 0.0 ? p->least_weight : p->least_positive_weight;
    for (int64_t first = 0; first < count; first += SIDE_BY_SIDE) {
        const int64_t n = count - first < SIDE_BY_SIDE ? count - first : SIDE_BY_SIDE;
        double rest[SIDE_BY_SIDE], drawn[SIDE_BY_SIDE], even[SIDE_BY_SIDE];
        int64_t at[SIDE_BY_SIDE], chosen[SIDE_BY_SIDE], place[SIDE_BY_SIDE], num_even = 0, k = 0;
        for (int64_t i = 0; i < n; i++) {
            const double u = uniform[first + i];
            if (u < even_share) {
                even[num_even] = u / even_share;
                place[SIDE_BY_SIDE - ++num_even] = i;
            } else {
                rest[k] = (u - even_share) / (1.0 - even_share);
                place[k++] = i;
            }
        }
        draw_weighted(p, &l, &from, &m, k, rest, at, drawn);
        for (int64_t i = 0; i < k; i++) {
            entry[first + place[i]] = at[i];
            if (importance)
                importance[first + place[i]] =
                    (float)pow(mixed(p, &m, drawn[i]) / mixed(p, &m, least), -beta);
        }
        if (num_even) draw_evenly(p, &even_levels, &even_from, num_even, even, chosen);
        for (int64_t i = 0; i < num_even; i++) {
            const int64_t to = first + place[SIDE_BY_SIDE - 1 - i];
            entry[to] = chosen[i];
            if (importance)
                importance[to] = (float)pow(
                    mixed(p, &m, weight_of(p, &l, chosen[i])) / mixed(p, &m, least), -beta);
        }
    }
    return OK;
}

int64_t NAME(recall_weights)(recall_priorities *, double *);
int64_t NAME(recall_weights)(recall_priorities *p, double *weights) {
    levels l;
    const int64_t status = prepare(p);
    if (status != OK) return status;
    find_levels(p->capacity, p->num_ranks ? p->num_ranks : p->size, p->nodes, &l);
    const mixture m = mixture_of(p, &l);
    for (int64_t i = 0; i < p->size; i++) {
        const double value = value_at(p, i);
        weights[i] = value >= p->form.least ? mixed(p, &m, weight_of(p, &l, i)) : 0.0;
    }
    return OK;
}

int64_t NAME(recall_prepare)(recall_priorities *);
int64_t NAME(recall_prepare)(recall_priorities *p) { return prepare(p); }

int64_t NAME(recall_census)(recall_priorities *);
int64_t NAME(recall_census)(recall_priorities *p) {
    if (!p->census_is_valid) take_census(p);
    return OK;
}

#endif

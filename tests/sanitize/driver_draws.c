/* Draws by value without Python: values of every kind, written, erased, resized and drawn from.
 *
 * driver_draws print SET    weights and entries with an instruction set, to compare between builds
 * driver_draws threads      histories in several threads at once, which must end as one does
 * driver_draws failures     lets every allocation fail in its turn, after which all must go on
 */
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "priorities.h"

int64_t allocations_left = -1; /* see guard.h */

enum { THREADS = 4, MOST_DRAWS = 5000, NUM_KINDS = 7 };

typedef struct {
    int64_t mode;
    double alpha, temperature, min_value, uniform_share;
    int draws_are_exact; /* no exponentials: the same entries with any instruction set */
} parameters;

static const parameters CASES[] = {
    {MODE_TOP, 1.0, 1.0, NAN, 0.0, 1},   {MODE_TOP, 1.0, 1.0, 0.5, 0.25, 1},
    {MODE_SOFT, 1.0, 0.5, NAN, 0.0, 0},  {MODE_SOFT, 1.0, 1e-3, -0.5, 0.25, 0},
    {MODE_RANK, 1.0, 1.0, NAN, 0.0, 1},  {MODE_RANK, 0.0, 1.0, 0.5, 0.25, 1},
    {MODE_RANK, 1.7, 1.0, 1e9, 0.0, 0},  {MODE_RANK, 90.0, 1.0, NAN, 0.25, 0},
    {MODE_PER, 1.0, 1.0, NAN, 0.25, 1},  {MODE_PER, 0.6, 1.0, 0.5, 0.0, 0},
    {MODE_PER, 100.0, 1.0, NAN, 0.0, 0}, {MODE_TOP, 1.0, 1.0, NAN, 1.0, 1},
};
enum { NUM_CASES = sizeof CASES / sizeof *CASES };

/* One history: what it works on, and what is kept of what it gives. */
typedef struct {
    recall_priorities p;
    void *values, *given, *nodes, *eligible, *order, *spare, *changed, *band;
    double *weights, *uniform;
    int64_t *entry;
    float *importance;
    uint64_t random_state, digest;
    int64_t num_failures, num_draws;
    int kind, prints, fails, is_exact, good;
} history;

static double number(history *h) { /* in [0, 1) */
    uint64_t z = h->random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

static int64_t below(history *h, int64_t n) { return (int64_t)(number(h) * (double)n); }

static double value(history *h) {
    const double x = 4.0 * number(h) - 2.0, rare = number(h);
    switch (h->kind) {
        case 0: return x;                                       /* all different */
        case 1: return rint(x * 2.0);                           /* ties, and both zeros */
        case 2: return rare < 0.3 ? NAN : rare < 0.6 ? -1e9 : x; /* -1e9: none yet */
        case 3: return -1e9;
        case 4: return 0.25;
        case 5: return rare < 0.1 ? x * 1e30 : rare < 0.2 ? INFINITY : x * 1e-30;
        default: return rare < 0.98 ? NAN : x;                  /* samples that are mostly empty */
    }
}

static void fill(history *h, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (h->p.is_double) ((double *)h->given)[i] = value(h);
        else ((float *)h->given)[i] = (float)value(h);
    }
}

static void keep(history *h, const void *from, size_t bytes) {
    const unsigned char *byte = from;
    for (size_t i = 0; i < bytes; i++) h->digest = (h->digest ^ byte[i]) * 0x100000001B3u;
}

static void expect(history *h, int holds, const char *what) {
    if (!holds && h->good)
        fprintf(stderr, "%s: capacity %" PRId64 ", size %" PRId64 ", mode %" PRId64 ", kind %d\n",
                what, h->p.capacity, h->p.size, h->p.mode, h->kind);
    h->good &= holds;
}

/* What the caller of the library does before each draw, see priorities/native.py. */
static void set(history *h, const parameters *with) {
    recall_priorities *p = &h->p;
    p->mode = with->mode;
    p->alpha = with->alpha;
    p->eps = 1e-8;
    p->temperature = with->temperature;
    p->uniform_share = with->uniform_share;
    p->has_min_value = !isnan(with->min_value);
    p->min_value = p->has_min_value ? with->min_value : 0.0;
    p->census_is_valid = p->least_is_valid = 0;
    h->is_exact = with->draws_are_exact;
}

static void count_best(history *h) {
    recall_census(&h->p);
    h->p.num_best = (h->p.num_drawable + 2) / 3;
    if (h->p.num_best < 1) h->p.num_best = 1;
}

/* Draws once, or, where allocations are to fail, until none of them does. */
static int64_t try_draw(history *h, int64_t count, double beta) {
    for (int64_t nth = 0;; nth++) {
        if (h->fails) allocations_left = nth;
        const int64_t status = recall_draw(&h->p, h->uniform, count, beta, h->entry,
                                           beta > 0.0 ? h->importance : NULL);
        if (!h->fails) return status; /* another thread may be here too */
        const int has_failed = allocations_left < 0;
        allocations_left = -1;
        if (!has_failed) return status;
        h->num_failures++;
        expect(h, status == NO_MEMORY, "an allocation failed, and none was missed");
    }
}

static void draw(history *h, int64_t count, double beta) {
    count_best(h);
    for (int64_t i = 0; i < count; i++) h->uniform[i] = number(h);
    if (count > 1) h->uniform[0] = 0.0, h->uniform[1] = 1.0 - 0x1p-53;
    const int64_t status = try_draw(h, count, beta);
    keep(h, &status, sizeof status);
    const int64_t expected = h->p.num_drawable ? OK : NOTHING_TO_DRAW;
    expect(h, status == expected, "the draw's status");
    if (status != OK) return;
    for (int64_t i = 0; i < count; i++) {
        expect(h, h->entry[i] >= 0 && h->entry[i] < h->p.size, "an entry that is not there");
        if (!h->prints || !h->is_exact || i >= 8) continue;
        printf("entry %" PRId64 "\n", h->entry[i]);
        if (beta > 0.0) printf("importance %.9g\n", (double)h->importance[i]);
    }
    keep(h, h->entry, (size_t)count * sizeof *h->entry);
    if (beta > 0.0) keep(h, h->importance, (size_t)count * sizeof *h->importance);
    if (h->p.size > 300) return;
    expect(h, recall_weights(&h->p, h->weights) == OK, "the weights' status");
    keep(h, h->weights, (size_t)h->p.size * sizeof *h->weights);
    double largest = 0.0;
    for (int64_t i = 0; i < h->p.size; i++) largest = fmax(largest, h->weights[i]);
    for (int64_t i = 0; i < count; i++) expect(h, h->weights[h->entry[i]] > 0.0, "weight 0 drawn");
    for (int64_t i = 0; h->prints && i < h->p.size && h->num_draws % 10 == 0; i++)
        printf("weight %.9g\n", h->weights[i] / largest);
}

static void draws(history *h) {
    static const int64_t COUNTS[] = {33, 0, 1, 31, 32};
    const int64_t nth = h->num_draws++;
    draw(h, COUNTS[nth % 5], 0.5 * (double)(nth % 2));
}

static void write(history *h, int64_t count) {
    recall_priorities *p = &h->p;
    int64_t *index = malloc((size_t)count * sizeof *index); /* not longer than it is */
    for (int64_t i = 0; i < count; i++) index[i] = below(h, p->capacity + 2) - 2;
    fill(h, count);
    int all_same = count > 1;
    for (int64_t i = 1; i < count; i++) all_same &= index[i] == index[0];
    const int64_t refused = recall_write(p, index, h->given, p->is_double, count, 1, -1e9);
    expect(h, all_same ? refused == -2 : refused >= 0, "what a write answers");
    const double one = 0.125; /* of the other type than the values, and one for all */
    if (!p->is_double) recall_write(p, index, &one, 1, count, 0, NAN);
    draws(h);
    recall_erase(p, index, count / 2);
    index[0] = p->capacity;
    expect(h, recall_write(p, index, h->given, p->is_double, count, 1, NAN) == -1, "range");
    expect(h, recall_erase(p, index, count) == -1, "range of erase");
    free(index);
    draws(h);
}

static void refresh(history *h, int64_t count) {
    fill(h, count);
    expect(h, recall_refresh(&h->p, h->given, h->p.is_double, count, (float)-1e9) >= 0, "refresh");
    count_best(h);
    recall_prepare(&h->p);
    draws(h);
}

static void live(history *h) {
    recall_priorities *p = &h->p;
    const int64_t n = p->capacity;
    expect(h, recall_refresh(p, h->given, 1, n + 1, NAN) == -1, "a refresh of too many");
    draws(h); /* of nothing */
    recall_resize(p, (n + 1) / 2);
    draws(h); /* no values yet */
    refresh(h, n);
    recall_resize(p, n - n / 20);
    write(h, 5);
    recall_resize(p, n);
    draws(h);
    write(h, 1);
    write(h, n < 40 ? 3 * n : n / 4 + 20);
    refresh(h, (n + 2) / 3);
    recall_resize(p, n - n / 3);
    for (int i = 0; i < 2; i++) write(h, 2);
    recall_resize(p, n);
    refresh(h, n); /* in the same mode, as all after the first */
    draw(h, n > 4000 ? MOST_DRAWS : 40, 0.5);
}

static void begin(history *h, int64_t capacity, int is_double, int64_t set_of) {
    const size_t n = (size_t)capacity, width = is_double ? 8 : 4, nodes = (size_t)recall_num_nodes(capacity);
    const size_t padded = (n + 15) / 16 * 16;
    h->p = (recall_priorities){.capacity = capacity, .is_double = is_double,
                               .instruction_set = set_of};
    h->random_state = (uint64_t)capacity;
    h->good = 1;
    h->digest = 0xCBF29CE484222325u;
    h->p.values = h->values = malloc(padded * width);
    for (size_t i = 0; i < padded; i++) {
        if (is_double) ((double *)h->values)[i] = -INFINITY;
        else ((float *)h->values)[i] = -INFINITY;
    }
    h->given = malloc((3 * n + 60) * width);
    h->p.nodes = h->nodes = malloc(nodes * 8);
    h->p.eligible = h->eligible = malloc(nodes * 8);
    h->p.order = h->order = malloc(n * 4);
    h->p.spare = h->spare = malloc(n * 4);
    h->p.changed = h->changed = malloc((n / 64 + 1) * 8);
    h->p.band = h->band = malloc(MAX_BAND * 4);
    h->weights = malloc(n * 8);
    h->uniform = malloc(MOST_DRAWS * 8);
    h->entry = malloc(MOST_DRAWS * 8);
    h->importance = malloc(MOST_DRAWS * 4);
}

static void end(history *h) {
    void *all[] = {h->values, h->given, h->nodes, h->eligible, h->order, h->spare,
                   h->changed, h->band, h->weights, h->uniform, h->entry, h->importance};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* What one history is of; the mode changes on the way. */
typedef struct {
    int64_t capacity, set;
    int is_double, kind, first, last, prints, fails, good;
    int64_t num_failures;
    uint64_t digest;
} plan;

static void *run(void *from) {
    plan *of = from;
    history h;
    memset(&h, 0, sizeof h);
    begin(&h, of->capacity, of->is_double, of->set);
    h.kind = of->kind;
    h.prints = of->prints;
    h.fails = of->fails;
    for (int i = of->first; i < of->last; i++) {
        set(&h, &CASES[i]);
        live(&h);
    }
    end(&h);
    of->good = h.good;
    of->digest = h.digest;
    of->num_failures = h.num_failures;
    return NULL;
}

static int run_in_threads(const plan *of) {
    pthread_t threads[THREADS];
    plan each[THREADS];
    int good = 1;
    for (int i = 0; i < THREADS; i++) {
        each[i] = *of;
        pthread_create(&threads[i], NULL, run, &each[i]);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        good &= each[i].good && each[i].digest == of->digest;
    }
    return good;
}

int main(int count, char **arguments) {
    static const int64_t LARGE[] = {255, 256, 257, 4095, 4096, 4097, 65537};
    const char *mode = count > 1 ? arguments[1] : "print";
    const int64_t best = recall_instruction_set(), sets[] = {0, 256, 512};
    int64_t num_failures = 0;
    for (int which = 0; which < 3 * 47 * 2 * NUM_KINDS; which++) {
        const int64_t set_of = sets[which % 3], size = which / 3 % 47;
        plan of = {.capacity = size < 40 ? size + 1 : LARGE[size - 40], .set = set_of};
        of.is_double = which / 3 / 47 % 2;
        of.kind = which / 3 / 47 / 2;
        if (set_of > best || (count > 2 && set_of != atoll(arguments[2]))) continue;
        if (of.capacity > 5000 && of.kind % 3) continue; /* long */
        if (!strcmp(mode, "threads") && (size % 4 != 2 || of.kind > 2)) continue;
        of.last = NUM_CASES;
        of.prints = !strcmp(mode, "print") && (of.capacity % 8 == 1 || size >= 40);
        if (of.prints) printf("model %" PRId64 " %d %d\n", of.capacity, of.is_double, of.kind);
        run(&of);
        int good = of.good;
        if (!strcmp(mode, "threads")) good &= run_in_threads(&of);
        if (!strcmp(mode, "failures")) {
            plan failing = of;
            failing.fails = 1;
            run(&failing);
            num_failures += failing.num_failures;
            good &= failing.good && failing.digest == of.digest;
        }
        if (good) continue;
        fprintf(stderr, "%s with %d: wrong for capacity %d, double %d, kind %d\n", mode,
                (int)set_of, (int)of.capacity, of.is_double, of.kind);
        return 1;
    }
    if (!strcmp(mode, "failures") && num_failures < 100) {
        fprintf(stderr, "only %d allocations have failed\n", (int)num_failures);
        return 1;
    }
    return 0;
}

/* The library without Python: models of every kind with made-up parameters, walked and printed.
 *
 * driver print SET      values of all walks with an instruction set, to compare between builds
 * driver threads        walks in several threads at once, which must give what one gives
 * driver failures       lets every allocation fail in its turn
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recall.h"

int64_t allocations_left = -1; /* see guard.h */

enum { STEPS = 4, TRACES = 2, THREADS = 4 };
enum states { STATES_NORMAL, STATES_LATTICE, STATES_SUPPORT, STATES_CLASS, NUM_STATES };
enum actions { ACTIONS_TANH, ACTIONS_NORMAL, ACTIONS_CLASS, NUM_ACTIONS };

static uint64_t random_state;

static float number(void) { /* in [-1, 1) */
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (float)((z ^ z >> 31) >> 40) / 8388608.0f - 1.0f;
}

static float *numbers(int64_t n, float low, float high) {
    float *made = malloc((size_t)n * sizeof *made);
    for (int64_t i = 0; i < n; i++) made[i] = low + (high - low) * (number() + 1) / 2;
    return made;
}

static void *zeros(int64_t n) { return calloc((size_t)n, 1); }

static const int64_t CARDINALITY[] = {5, 6};
static const float SUPPORT[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}};
static const float LATTICE[][2] = {{.5f, 0}, {-.5f, 0}, {0, .5f}, {0, -.5f}};
static const float ZERO[] = {0, 0}, LAST[] = {4, 5}, LOW[] = {-2, -2}, HIGH[] = {2, 2};

static recall_network network(int64_t inputs, int64_t outputs, int layers, int64_t activation) {
    static const int64_t WIDTHS[] = {17, 100, 3, 5, 1};
    recall_network made = {.num_layers = layers + 1, .activation = activation, .slope = .25f};
    made.width[0] = inputs;
    for (int i = 0; i <= layers; i++) {
        made.width[i + 1] = i < layers ? WIDTHS[i] : outputs;
        float size = 1.5f / (1 + (float)made.width[i] / 8);
        made.weight[i] = numbers(made.width[i] * made.width[i + 1], -size, size);
        made.bias[i] = numbers(made.width[i + 1], -.5f, .5f);
    }
    return made;
}

static recall_head gaussian(int64_t kind, int64_t size) {
    recall_head made = {.kind = kind, .size = size, .low = -5, .width = 7, .floor = 1e-6f};
    made.mean = numbers(size, -1, 1);
    made.spread = numbers(size, .5f, 2);
    return made;
}

static recall_model model(int states, int actions, int layers, int64_t activation, int bfloat16) {
    recall_model m = {.is_bfloat16 = bfloat16, .floor = 1e-6f};
    random_state = (uint64_t)(states * 1000 + actions * 100 + layers * 20) + (uint64_t)activation;
    m.is_discrete = states >= STATES_SUPPORT;
    m.state_size = states == STATES_NORMAL ? 3 : 2;
    m.action = (recall_head){.kind = HEAD_CLASS, .size = 3};
    if (actions != ACTIONS_CLASS)
        m.action = gaussian(actions == ACTIONS_TANH ? HEAD_TANH_NORMAL : HEAD_NORMAL, 2);
    if (m.is_discrete) {
        m.cardinality = CARDINALITY;
        m.has_joint_code = states == STATES_CLASS;
        m.feature_size = 5 + 6 + (m.has_joint_code ? 30 : 0);
    } else {
        m.feature_size = m.state_size;
        m.mean = numbers(m.state_size, -1, 1);
        m.variance = numbers(m.state_size, .5f, 2);
    }
    if (states == STATES_NORMAL) {
        m.delta = gaussian(HEAD_NORMAL, 3);
    } else if (states == STATES_CLASS) {
        m.delta = (recall_head){.kind = HEAD_CLASS, .size = 30};
    } else {
        m.delta = (recall_head){.kind = HEAD_SUPPORT, .size = 4};
        m.support = m.is_discrete ? SUPPORT[0] : LATTICE[0];
        m.lowest = m.is_discrete ? ZERO : LOW;
        m.highest = m.is_discrete ? LAST : HIGH;
        m.has_dead_ends = 1;
    }
    const int64_t action_outputs = actions == ACTIONS_CLASS ? 3 : 4;
    const int64_t seen = actions == ACTIONS_CLASS ? 3 : 2;
    const int64_t delta_outputs = states == STATES_NORMAL ? 6 : m.delta.size;
    m.network[NETWORK_ACTION] = network(m.feature_size, action_outputs, layers, activation);
    m.network[NETWORK_DELTA] = network(m.feature_size + seen, delta_outputs, layers, activation);
    if (layers % 2) m.network[NETWORK_STOP] = network(m.feature_size, 1, layers, activation);
    return m;
}

static void free_model(recall_model *m) {
    for (int n = 0; n < NUM_NETWORKS; n++) {
        for (int64_t i = 0; i < m->network[n].num_layers; i++) {
            free((void *)m->network[n].weight[i]);
            free((void *)m->network[n].bias[i]);
        }
    }
    recall_head *heads[] = {&m->action, &m->delta};
    for (int i = 0; i < 2; i++) free((void *)heads[i]->mean), free((void *)heads[i]->spread);
    free((void *)m->mean);
    free((void *)m->variance);
}

/* A call, with the sizes of its outputs. */
typedef struct {
    recall_call call;
    int64_t entry, action_entry; /* bytes of a state, of an action */
} outputs;

static outputs ask(const recall_model *m, int64_t set, int64_t rows, int last_visit, int given) {
    outputs out = {.entry = m->state_size * (m->is_discrete ? 8 : 4)};
    out.action_entry = m->action.kind == HEAD_CLASS ? 8 : m->action.size * 4;
    const int64_t starts = (rows + TRACES - 1) / TRACES, steps = rows * STEPS;
    void *start = zeros(starts * out.entry);
    for (int64_t i = 0; i < starts * m->state_size; i++) {
        float at = number();
        if (m->is_discrete)
            ((int64_t *)start)[i] = (int64_t)((at + 1) / 2 * (float)CARDINALITY[i % 2]);
        else
            ((float *)start)[i] = m->delta.kind == HEAD_SUPPORT ? (float)(int)(at * 4) / 2 : at;
    }
    out.call = (recall_call){.num_rows = rows, .num_traces = TRACES, .num_steps = STEPS,
                             .start = start, .seed = -7, .last_visit = last_visit,
                             .instruction_set = set};
    out.call.state = zeros(steps * out.entry);
    out.call.next_state = zeros(steps * out.entry);
    out.call.action = zeros(steps * out.action_entry);
    out.call.action_log_prob = zeros(steps * 4);
    out.call.delta_log_prob = zeros(steps * 4);
    out.call.mask = zeros(steps);
    if (given) {
        /* Both kinds of noise take numbers in [0, 1). */
        out.call.noise_action = numbers(steps * m->action.size, 0, 1);
        out.call.noise_delta = numbers(steps * m->delta.size, 0, 1);
        out.call.noise_stop = numbers(steps, 0, 1);
    }
    return out;
}

static void free_outputs(outputs *out) {
    recall_call *c = &out->call;
    free((void *)c->start);
    void *columns[] = {c->state, c->next_state, c->action, c->action_log_prob, c->delta_log_prob};
    for (int i = 0; i < 5; i++) free(columns[i]);
    free(c->mask);
    const float *noises[] = {c->noise_action, c->noise_delta, c->noise_stop};
    for (int i = 0; i < 3; i++) free((void *)noises[i]);
}

static void print_floats(const char *name, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) printf("%s %.9g\n", name, (double)from[i]);
}

static void print_integers(const char *name, const int64_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) printf("%s %" PRId64 "\n", name, from[i]);
}

static void print(const recall_model *m, const outputs *out) {
    const recall_call *c = &out->call;
    const int64_t steps = c->num_rows * STEPS;
    if (m->is_discrete) print_integers("state", c->state, steps * m->state_size);
    else print_floats("state", c->state, steps * m->state_size);
    if (m->action.kind == HEAD_CLASS) print_integers("action", c->action, steps);
    else print_floats("action", c->action, steps * m->action.size);
    print_floats("action_log_prob", c->action_log_prob, steps);
    print_floats("delta_log_prob", c->delta_log_prob, steps);
    for (int64_t i = 0; i < steps; i++) printf("mask %d\n", c->mask[i]);
}

static int same(const outputs *a, const outputs *b) {
    const recall_call *one = &a->call, *other = &b->call;
    const size_t steps = (size_t)one->num_rows * STEPS;
    return !memcmp(one->state, other->state, steps * (size_t)a->entry) &&
           !memcmp(one->next_state, other->next_state, steps * (size_t)a->entry) &&
           !memcmp(one->action, other->action, steps * (size_t)a->action_entry) &&
           !memcmp(one->action_log_prob, other->action_log_prob, steps * 4) &&
           !memcmp(one->delta_log_prob, other->delta_log_prob, steps * 4) &&
           !memcmp(one->mask, other->mask, steps);
}

/* What all threads of a walk share. */
typedef struct {
    const recall_model *model;
    const void *source;
    recall_call *call;
    int64_t (*function)(const recall_model *, const void *, recall_call *);
} shared;

static void *walk_shared(void *from) {
    shared *s = from;
    return (void *)(intptr_t)s->function(s->model, s->source, s->call);
}

static int64_t walk_in_threads(shared *s) {
    pthread_t threads[THREADS];
    int64_t worst = OK;
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, walk_shared, s);
    for (int i = 0; i < THREADS; i++) {
        void *status;
        pthread_join(threads[i], &status);
        if ((intptr_t)status > worst) worst = (intptr_t)status;
    }
    return worst;
}

/* Fails each allocation of a walk in turn; the walk must say so. */
static int64_t fail_each(shared *s) {
    for (int64_t nth = 0;; nth++) {
        allocations_left = nth;
        s->call->next_tile = 0;
        int64_t status = s->function(s->model, s->source, s->call);
        if (allocations_left >= 0) {
            allocations_left = -1;
            return nth ? status : NO_MEMORY; /* a walk without allocations has tested nothing */
        }
        if (status != NO_MEMORY) return status == OK ? NO_MEMORY : status;
    }
}

static void *aligned(int64_t bytes, void **memory) {
    *memory = malloc((size_t)bytes + 64);
    return (void *)(((uintptr_t)*memory + 63) / 64 * 64);
}

static int run(const char *mode, int64_t set, const recall_model *m) {
    /* Several tiles, or less than one, of which a part is never written. */
    const int64_t rows = m->network[NETWORK_ACTION].num_layers % 4 < 2 ? 131 : 5;
    void *memories[2] = {NULL, NULL}, *block = aligned(recall_packed_bytes(m), &memories[0]);
    int good = 1;
    recall_pack(m, block);
    good &= recall_is_current(m, block) == 1;
    const int can_look_up = m->is_discrete && m->action.kind == HEAD_CLASS;
    for (int i = 0; i < (can_look_up ? 8 : 4); i++) {
        const uint64_t before = random_state;
        outputs out = ask(m, set, rows, i % 2, i / 2 % 2);
        random_state = before;
        shared s = {m, block, &out.call, recall_walk};
        if (i >= 4) {
            if (!memories[1]) {
                s.source = aligned(recall_table_bytes(m), &memories[1]);
                if (!strcmp(mode, "failures")) {
                    allocations_left = 0;
                    good &= recall_tables(m, block, (void *)s.source, set) == NO_MEMORY;
                    allocations_left = -1;
                }
                good &= recall_tables(m, block, (void *)s.source, set) == OK;
            }
            s.source = (void *)(((uintptr_t)memories[1] + 63) / 64 * 64);
            s.function = recall_look_up;
        }
        if (!strcmp(mode, "failures")) {
            good &= fail_each(&s) == OK;
        } else {
            good &= s.function(m, s.source, s.call) == OK;
            good &= out.call.finite_rows == rows && !out.call.bad_starts;
        }
        if (!strcmp(mode, "print")) print(m, &out);
        if (!strcmp(mode, "threads")) {
            outputs again = ask(m, set, rows, i % 2, i / 2 % 2);
            s.call = &again.call;
            good &= walk_in_threads(&s) == OK && same(&out, &again);
            free_outputs(&again);
        }
        free_outputs(&out);
    }
    free(memories[0]);
    free(memories[1]);
    return good;
}

int main(int count, char **arguments) {
    const char *mode = count > 1 ? arguments[1] : "print";
    const int64_t best = recall_instruction_set(), sets[] = {0, 256, 512, 513};
    for (int i = 0; i < 4; i++) {
        const int64_t set = sets[i];
        if (set > best || (count > 2 && set != atoll(arguments[2]))) continue;
        for (int which = 0; which < NUM_STATES * NUM_ACTIONS * 6; which++) {
            const int states = which % NUM_STATES, actions = which / NUM_STATES % NUM_ACTIONS;
            const int layers = which / NUM_STATES / NUM_ACTIONS, activation = which % (MISH + 1);
            if (!strcmp(mode, "print"))
                printf("model states %d actions %d layers %d activation %d\n", states, actions,
                       layers, activation);
            recall_model m = model(states, actions, layers, activation, set == 513);
            int good = run(mode, set, &m);
            free_model(&m);
            if (good) continue;
            fprintf(stderr, "%s with %d: wrong for states %d, actions %d, layers %d\n", mode,
                    (int)set, states, actions, layers);
            return 1;
        }
    }
    return 0;
}

/* The walk itself, compiled once for each instruction set; NAME gives its functions their names. */
#include "mixture.h"
#include "look_up.h"

/* Reads the starts of a tile; returns whether all of them are states. */
static int enter(tile *t) {
    const recall_model *m = t->model;
    const int64_t size = m->state_size;
    int good = 1;
    memset(t->broken, 0, sizeof t->broken); /* of lanes beyond the tile's, too */
    for (int lane = 0; lane < t->lanes; lane++) {
        int last = lane < t->count ? lane : t->count - 1;
        int64_t from = t->start[lane] = (t->first + last) / t->call->num_traces * size;
        for (int64_t i = 0; i < size; i++) {
            float value = m->is_discrete ? (float)((const int64_t *)t->call->start)[from + i]
                                         : ((const float *)t->call->start)[from + i];
            good &= value - value == 0.0f;
            if (m->is_discrete) good &= value >= 0.0f && value < (float)m->cardinality[i];
            t->state[i * TILE + lane] = value;
        }
        t->over[lane] = 0;
        t->check[lane] = 0.0f;
    }
    return good;
}

static void end_episodes(tile *t, int64_t step) {
    run(t, NETWORK_STOP, hot_state(t->model));
    draw_uniforms(t, WORD_STOP, step, t->call->noise_stop);
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        /* A probability that is not a number ends the trace, too. */
        vm goes_on = v_le(v_sigmoid(v_load(t->output + lane)), v_load(t->noise + lane));
        v_store(t->row + lane, v_select(goes_on, v_set(0.0f), v_set(1.0f)));
    }
    for (int lane = 0; lane < t->count; lane++) t->over[lane] |= t->row[lane] != 0.0f;
}

static void act(tile *t, int64_t step) {
    const recall_model *m = t->model;
    run_action(t);
    if (m->action.kind == HEAD_BOX) {
        box_action(t, step);
        return;
    }
    if (is_continuous(&m->action)) {
        normal_action(t, step);
        return;
    }
    draw_uniforms(t, WORD_ACTION, step, t->call->noise_action);
    draw_class(t, m->action.size, t->action_log_prob);
    int32_t first = m->is_discrete ? (int32_t)m->feature_size : 0;
    for (int lane = 0; lane < t->lanes; lane++) {
        t->action_class[lane] = t->chosen[lane];
        t->index[hot_state(m) * TILE + lane] = first + t->chosen[lane];
        t->check[lane] = t->action_log_prob[lane] * 0.0f;
    }
}

static void go_back(tile *t, int64_t step) {
    const recall_model *m = t->model;
    run(t, NETWORK_DELTA, hot_state(m) + !is_continuous(&m->action));
    if (m->delta.kind == HEAD_MIXTURE) {
        mixture_delta(t, step);
        return;
    }
    if (is_continuous(&m->delta)) {
        normal_delta(t, step);
        return;
    }
    if (m->delta.kind == HEAD_SUPPORT) mask_support(t);
    draw_uniforms(t, WORD_DELTA, step, t->call->noise_delta);
    draw_class(t, m->delta.size, t->delta_log_prob);
    for (int lane = 0; lane < t->lanes; lane++) t->check[lane] += t->delta_log_prob[lane] * 0.0f;
    displace(t);
}

/* Walks a tile; returns how many of its traces could make a first step, or -1 for a bad start. */
static int64_t walk_tile(tile *t) {
    const recall_call *call = t->call;
    const int64_t last = call->num_steps - 1;
    int64_t finite_rows = 0;
    if (!enter(t)) return -1;
    write_states(t, NULL, column_at(t, call->next_state, last));
    if (call->last_visit) {
        memset(t->visited, 0, (size_t)(visit_capacity(call) * TILE) * sizeof *t->visited);
        for (int lane = 0; lane < t->count; lane++) visit_again(t, lane, last + 1);
    }
    for (int64_t step = last; step >= 0; step--) {
        look(t);
        expect_write(t, step);
        if (t->packed.network[NETWORK_STOP].num_layers) end_episodes(t, step);
        act(t, step);
        go_back(t, step);
        write_step(t, step);
        if (step == last) {
            for (int lane = 0; lane < t->count; lane++) finite_rows += !t->broken[lane];
        }
    }
    return finite_rows;
}

int64_t NAME(recall_walk)(const recall_model *model, const void *block, recall_call *call);
int64_t NAME(recall_walk)(const recall_model *model, const void *block, recall_call *call) {
    tile t;
    memset(&t, 0, sizeof t);
    t.model = model;
    t.call = call;
    packed_layout(model, block, &t.packed);
    if (!open_tile(&t)) return NO_MEMORY;
    schedule_keys(&t.keys, (uint64_t)call->seed);
    for (;;) {
        int64_t tile_index = atomic_add(&call->next_tile, 1);
        t.first = tile_index * TILE;
        if (t.first >= call->num_rows) break;
        int64_t left = call->num_rows - t.first;
        t.count = left < TILE ? (int)left : TILE;
        t.lanes = (int)ROUND_UP(t.count, LANES);
        int64_t finite = walk_tile(&t);
        if (finite < 0) {
            atomic_add(&call->bad_starts, 1);
            break;
        }
        atomic_add(&call->finite_rows, finite);
    }
    free(t.memory);
    return OK;
}

int64_t NAME(recall_words)(const uint32_t counter[3], uint64_t seed, uint32_t words[4]);
int64_t NAME(recall_words)(const uint32_t counter[3], uint64_t seed, uint32_t words[4]) {
    philox_keys keys;
    vi word[4];
    schedule_keys(&keys, seed);
    philox(vi_set(counter[0]), vi_set(counter[1]), counter[2], &keys, word);
    for (int i = 0; i < 4; i++) {
        uint32_t lanes[LANES];
        vi_store(lanes, word[i]);
        words[i] = lanes[LANES - 1];
    }
    return OK;
}

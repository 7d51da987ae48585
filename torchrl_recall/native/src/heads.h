/* The heads of a model on a tile: from a network's output and noise to values and log-densities. */
#ifndef RECALL_HEADS_H
#define RECALL_HEADS_H

#include "tile.h"

/* atanh(1 - 1e-6), see TANH_LIMIT in heads.py */
#define TANH_LIMIT 7.2543286f
#define UNIT_ROUNDOFF 1.1920929e-7f

/* Short loops, with what lies between them in memory: a processor looks only some hundred operations
 * ahead, and the chain from a network's output to a sample is longer than that. */

INLINE vf log_scale_of(const recall_head *head, vf raw) {
    return v_fma(v_set(head->width), v_sigmoid(raw), v_set(head->low));
}

/* Turns the second half of a head's outputs into log-scales; `add` is one for each value, or NULL. */
static void find_log_scales(tile *t, const recall_head *head, const float *add) {
    for (int64_t i = 0; i < head->size; i++) {
        for (int lane = 0; lane < t->lanes; lane += LANES) {
            float *at = t->output + (head->size + i) * TILE + lane;
            vf log_scale = log_scale_of(head, v_load(at));
            v_store(at, add ? v_add(log_scale, v_set(add[i])) : log_scale);
        }
    }
}

/* Samples the action: `action` in its own unit, `features` as the delta network sees it. */
static void normal_action(tile *t, int64_t step) {
    const recall_head *head = &t->model->action;
    const int64_t size = head->size;
    const int squashed = head->kind == HEAD_TANH_NORMAL;
    float *features = t->features + dense_state(t->model) * TILE;
    draw_normals(t, HEAD_ACTION, size, step, t->call->noise_action);
    find_log_scales(t, head, NULL);
    for (int64_t i = 0; i < size; i++) {
        for (int lane = 0; lane < t->lanes; lane += LANES) {
            int64_t at = i * TILE + lane;
            vf scale = v_exp(v_load(t->output + size * TILE + at));
            v_store(features + at, v_fma(scale, v_load(t->noise + at), v_load(t->output + at)));
        }
    }
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        vf energy = v_set(0.0f), check = v_set(0.0f);
        for (int64_t i = 0; i < size; i++) {
            int64_t at = i * TILE + lane;
            vf value = v_load(features + at), z = v_load(t->noise + at);
            vf log_scale = v_load(t->output + size * TILE + at);
            if (squashed) {
                vf inside = v_max(v_set(-TANH_LIMIT), v_min(v_set(TANH_LIMIT), value));
                /* The noise that would have led to the clamped value; rarely another. */
                if (!vm_all(v_eq(inside, value)))
                    z = v_add(z, v_div(v_sub(inside, value), v_exp(log_scale)));
                vf log_jacobian;
                value = v_tanh_with_log_jacobian(inside, &log_jacobian);
                energy = v_add(energy, log_jacobian);
            }
            energy = v_fma(v_mul(z, v_set(0.5f)), z, v_add(energy, log_scale));
            v_store(features + at, value);
            vf unit = v_set(t->packed.action_times[i]);
            vf own = v_fma(value, unit, v_set(t->packed.action_add[i]));
            check = v_fma(own, v_set(0.0f), check);
            v_store(t->action + at, own);
        }
        vf log_prob = v_sub(v_set(t->packed.constants[0]), energy);
        v_store(t->action_log_prob + lane, log_prob);
        v_store(t->check + lane, v_fma(log_prob, v_set(0.0f), check));
    }
}

/* Uniform actions of a box. */
static void box_action(tile *t, int64_t step) {
    const int64_t size = t->model->action.size;
    float *features = t->features + dense_state(t->model) * TILE;
    draw_normals(t, HEAD_ACTION, size, step, t->call->noise_action);
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        vf check = v_set(0.0f);
        for (int64_t i = 0; i < size; i++) {
            int64_t at = i * TILE + lane;
            vf value = v_erf(v_mul(v_load(t->noise + at), v_set(0.70710678f)));
            vf unit = v_set(t->packed.action_times[i]);
            vf own = v_fma(value, unit, v_set(t->packed.action_add[i]));
            check = v_fma(own, v_set(0.0f), check);
            v_store(features + at, value);
            v_store(t->action + at, own);
        }
        v_store(t->action_log_prob + lane, v_set(t->packed.constants[0]));
        v_store(t->check + lane, check);
    }
}

/* Samples the change, and turns `state` into its predecessor. */
static void normal_delta(tile *t, int64_t step) {
    const recall_head *head = &t->model->delta;
    const int64_t size = head->size;
    draw_normals(t, HEAD_DELTA, size, step, t->call->noise_delta);
    find_log_scales(t, head, t->packed.delta_log_unit);
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        vf energy = v_set(0.0f), check = v_load(t->check + lane);
        for (int64_t i = 0; i < size; i++) {
            int64_t at = i * TILE + lane;
            vf loc = v_load(t->output + at), z = v_load(t->noise + at);
            vf log_scale = v_load(t->output + size * TILE + at);
            vf value = v_fma(v_exp(log_scale), z, v_load(t->state + at));
            value = v_fma(loc, v_set(t->packed.delta_unit[i]), value);
            energy = v_fma(v_mul(z, v_set(0.5f)), z, v_add(energy, log_scale));
            check = v_fma(value, v_set(0.0f), check);
            v_store(t->state + at, value);
        }
        vf log_prob = v_sub(v_set(t->packed.constants[1]), energy);
        v_store(t->delta_log_prob + lane, log_prob);
        v_store(t->check + lane, v_fma(log_prob, v_set(0.0f), check));
    }
}

/* Inverts the cumulative distribution of the logits at `output`, [n], at the first row of `noise`:
 * the class goes to `chosen`. A logit of minus infinity is never drawn. */
static void draw_class(tile *t, int64_t n, float *log_prob_out) {
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        const float *logits = t->output + lane;
        vf greatest = v_load(logits), total = v_set(0.0f), cumulative = total, index = total;
        for (int64_t j = 1; j < n; j++) greatest = v_max(greatest, v_load(logits + j * TILE));
        for (int64_t j = 0; j < n; j++) {
            vf share = v_exp(v_sub(v_load(logits + j * TILE), greatest));
            total = v_add(total, share);
            v_store(t->hidden[0] + j * TILE + lane, share);
        }
        /* Just below the total, so that rounding never lands behind the last possible class. */
        vf threshold = v_mul(v_mul(v_load(t->noise + lane), total), v_set(1.0f - UNIT_ROUNDOFF));
        vf logit = v_load(logits);
        for (int64_t j = 0; j + 1 < n; j++) {
            cumulative = v_add(cumulative, v_load(t->hidden[0] + j * TILE + lane));
            vm beyond = v_le(cumulative, threshold);
            index = v_add(index, v_select(beyond, v_set(1.0f), v_set(0.0f)));
            logit = v_select(beyond, v_load(logits + (j + 1) * TILE), logit);
        }
        vf log_prob = v_sub(v_sub(logit, greatest), v_log(total));
        vi_store(t->chosen + lane, v_round(index));
        v_store(log_prob_out + lane, log_prob);
    }
}

/* Masks displacements that leave the spec; says for each lane (at `row`) if there is another. */
static void mask_support(tile *t) {
    const recall_model *m = t->model;
    const int64_t n = m->delta.size, size = m->state_size;
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        vf any = v_set(0.0f), minus_infinity = vi_float(vi_set(0xff800000u));
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t j = 0; j < n; j++) {
                vf inside = v_set(1.0f);
                for (int64_t i = 0; i < size; i++) {
                    vf reached = v_add(v_load(t->state + i * TILE + lane),
                                       v_set(m->support[j * size + i]));
                    vm good = vm_and(v_le(v_set(m->lowest[i]), reached),
                                     v_le(reached, v_set(m->highest[i])));
                    inside = v_select(good, inside, v_set(0.0f));
                }
                if (pass == 0) {
                    any = v_max(any, inside);
                    continue;
                }
                /* At a dead end there is no right answer, but there must be a finite one. */
                vm kept = v_le(any, inside);
                float *logit = t->output + j * TILE + lane;
                v_store(logit, v_select(kept, v_load(logit), minus_infinity));
            }
        }
        v_store(t->row + lane, any);
    }
}

/* Turns `state` into the predecessor that `chosen` names; a dead end stays where it is. */
static void displace(tile *t) {
    const recall_model *m = t->model;
    const int64_t size = m->state_size;
    for (int lane = 0; lane < t->count; lane++) {
        if (m->delta.kind == HEAD_CLASS) {
            int64_t rest = t->chosen[lane];
            for (int64_t i = size - 1; i >= 0; i--) {
                t->state[i * TILE + lane] = (float)(rest % m->cardinality[i]);
                rest /= m->cardinality[i];
            }
        } else if (m->has_dead_ends && t->row[lane] == 0.0f) {
            t->over[lane] = 1;
        } else {
            const float *step = m->support + t->chosen[lane] * size;
            int inside = 1;
            /* Logits that are not numbers choose anything, and what is no state has no embedding. */
            for (int64_t i = 0; m->is_discrete && i < size; i++) {
                float reached = t->state[i * TILE + lane] + step[i];
                inside &= reached >= 0.0f && reached < (float)m->cardinality[i];
            }
            for (int64_t i = 0; inside && i < size; i++) t->state[i * TILE + lane] += step[i];
        }
    }
}

#endif

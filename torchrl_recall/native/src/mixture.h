/* The mixture head on a tile: picks a component, samples the change, and sums up its density. */
#ifndef RECALL_MIXTURE_H
#define RECALL_MIXTURE_H

#include "heads.h"

/* Normal CDF of a row of noise, which makes it uniform. */
INLINE vf v_normal_cdf(vf z) {
    vf half = v_set(0.5f);
    return v_fma(half, v_erf(v_mul(z, v_set(0.70710678f))), half);
}

/* Which component the last row of noise picks: as `draw_class`, of the logits at `logits`, [n].
 * Leaves the sum of their shares, relative to the greatest, at `total`. */
INLINE vf pick_component(tile *t, const float *logits, int64_t n, vf uniform, vf *greatest,
                         vf *total, int lane) {
    float *shares = t->hidden[0] + lane;
    vf most = v_load(logits), sum = v_set(0.0f), cumulative = sum, index = sum;
    for (int64_t k = 1; k < n; k++) most = v_max(most, v_load(logits + k * TILE));
    for (int64_t k = 0; k < n; k++) {
        vf share = v_exp(v_sub(v_load(logits + k * TILE), most));
        sum = v_add(sum, share);
        v_store(shares + k * TILE, share);
    }
    vf threshold = v_mul(v_mul(uniform, sum), v_set(1.0f - UNIT_ROUNDOFF));
    for (int64_t k = 0; k + 1 < n; k++) {
        cumulative = v_add(cumulative, v_load(shares + k * TILE));
        vm beyond = v_le(cumulative, threshold);
        index = v_add(index, v_select(beyond, v_set(1.0f), v_set(0.0f)));
    }
    *greatest = most;
    *total = sum;
    return index;
}

/* Samples the change, and turns `state` into its predecessor. The output is locations [K, size], raw
 * log-scales [K, size] and logits [K]. */
static void mixture_delta(tile *t, int64_t step) {
    const recall_head *head = &t->model->delta;
    const int64_t size = head->size, num = head->components, part = num * size;
    draw_normals(t, HEAD_DELTA, size + 1, step, t->call->noise_delta);
    for (int lane = 0; lane < t->lanes; lane += LANES) {
        const float *loc_at = t->output + lane, *raw_at = loc_at + part * TILE;
        const float *logits = raw_at + part * TILE;
        float *values = t->hidden[1] + lane, *terms = t->hidden[0] + lane;
        vf greatest, total, check = v_load(t->check + lane);
        vf uniform = v_normal_cdf(v_load(t->noise + size * TILE + lane));
        vf index = pick_component(t, logits, num, uniform, &greatest, &total, lane);
        for (int64_t i = 0; i < size; i++) {
            vf loc = v_load(loc_at + i * TILE), raw = v_load(raw_at + i * TILE);
            for (int64_t k = 1; k < num; k++) {
                vm chosen = v_eq(index, v_set((float)k));
                loc = v_select(chosen, v_load(loc_at + (k * size + i) * TILE), loc);
                raw = v_select(chosen, v_load(raw_at + (k * size + i) * TILE), raw);
            }
            vf z = v_load(t->noise + i * TILE + lane);
            v_store(values + i * TILE, v_fma(v_exp(log_scale_of(head, raw)), z, loc));
        }
        vf most = v_set(0.0f);
        for (int64_t k = 0; k < num; k++) {
            vf energy = v_set(0.0f);
            for (int64_t i = 0; i < size; i++) {
                int64_t at = (k * size + i) * TILE;
                vf log_scale = log_scale_of(head, v_load(raw_at + at));
                vf z = v_sub(v_load(values + i * TILE), v_load(loc_at + at));
                z = v_mul(z, v_exp(v_neg(log_scale)));
                energy = v_fma(v_mul(z, v_set(0.5f)), z, v_add(energy, log_scale));
            }
            vf term = v_sub(v_sub(v_load(logits + k * TILE), greatest), energy);
            most = k ? v_max(most, term) : term;
            v_store(terms + k * TILE, term);
        }
        vf sum = v_set(0.0f);
        for (int64_t k = 0; k < num; k++)
            sum = v_add(sum, v_exp(v_sub(v_load(terms + k * TILE), most)));
        for (int64_t i = 0; i < size; i++) {
            float *state = t->state + i * TILE + lane;
            vf unit = v_set(t->packed.delta_unit[i]);
            vf value = v_fma(v_load(values + i * TILE), unit, v_load(state));
            check = v_fma(value, v_set(0.0f), check);
            v_store(state, value);
        }
        vf log_prob = v_add(v_sub(v_log(sum), v_log(total)), most);
        log_prob = v_add(v_set(t->packed.constants[1]), log_prob);
        v_store(t->delta_log_prob + lane, log_prob);
        v_store(t->check + lane, v_fma(log_prob, v_set(0.0f), check));
    }
}

#endif

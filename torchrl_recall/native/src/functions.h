/* Elementary functions of vectors, to about one unit in the last place of a float.
 *
 * The polynomials are minimax fits made for this file (Lawson's iteration), each with the relative
 * error of the fit itself. NaN in, NaN out.
 */
#ifndef RECALL_FUNCTIONS_H
#define RECALL_FUNCTIONS_H

#include "vector.h"

/* exp(x); 0 below -86.9, e^88.37 above that. */
INLINE vf v_exp(vf x) {
    /* The NaN, if any, must be the second operand of min and max. */
    vf y = v_max(v_set(-86.9f), v_min(v_set(88.37f), x));
    vi n = v_round(v_mul(y, v_set(1.44269504f)));
    vf k = vi_convert(n);
    vf r = v_fnma(k, v_set(0.693359375f), y);
    r = v_fnma(k, v_set(-2.12194440e-4f), r);
    vf p = v_set(0.001383674187f); /* 2e-9 */
    p = v_fma(p, r, v_set(0.008374898363f));
    p = v_fma(p, r, v_set(0.0416682318f));
    p = v_fma(p, r, v_set(0.1666641919f));
    p = v_fma(p, r, v_set(0.4999999203f));
    vf z = v_fma(v_mul(r, r), p, v_add(r, v_set(1.0f)));
    /* 2^n: at 88.37 n is 127, the greatest that there is. */
    vf power = v_mul(z, vi_float(vi_shift_left(vi_add(n, vi_set(127)), 23)));
    return v_select(v_lt(x, v_set(-86.9f)), v_set(0.0f), power);
}

INLINE vf v_sigmoid(vf x) {
    return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_neg(x))));
}

/* tanh(x) from e = exp(-2 |x|). */
INLINE vf v_tanh_from(vf x, vf size, vf e) {
    vf z = v_mul(x, x);
    vf p = v_set(-0.006096346312f); /* 1.3e-7 of the cubic term */
    p = v_fma(p, z, v_set(0.02099683227f));
    p = v_fma(p, z, v_set(-0.05385079875f));
    p = v_fma(p, z, v_set(0.1333276839f));
    p = v_fma(p, z, v_set(-0.333333289f));
    vf near = v_fma(v_mul(z, x), p, x);
    vf far = v_div(v_sub(v_set(1.0f), e), v_add(v_set(1.0f), e));
    return v_select(v_lt(size, v_set(0.625f)), near, v_copy_sign(far, x));
}

INLINE vf v_tanh(vf x) {
    vf size = v_abs(x);
    return v_tanh_from(x, size, v_exp(v_mul(size, v_set(-2.0f))));
}

/* x = 2^k (1 + f) of a positive normal number, with 1 + f in [sqrt(1/2), sqrt(2)). */
INLINE void v_split(vf x, vf *k, vf *f) {
    vi shifted = vi_sub(v_bits(x), vi_set(0x3f3504f3u));
    vi whole = vi_and(shifted, vi_set(0xff800000u));
    *f = v_sub(vi_float(vi_sub(v_bits(x), whole)), v_set(1.0f));
    *k = v_mul(vi_convert(whole), v_set(1.1920929e-7f)); /* 2^-23 */
}

/* log(2^k (1 + f)). */
INLINE vf v_log_of_split(vf k, vf f) {
    vf z = v_mul(f, f);
    vf p = v_set(0.07037682056f); /* 6.5e-8 of the cubic term */
    p = v_fma(p, f, v_set(-0.1151460226f));
    p = v_fma(p, f, v_set(0.1167699532f));
    p = v_fma(p, f, v_set(-0.1242014198f));
    p = v_fma(p, f, v_set(0.1424932336f));
    p = v_fma(p, f, v_set(-0.1666805762f));
    p = v_fma(p, f, v_set(0.2000071474f));
    p = v_fma(p, f, v_set(-0.2499999399f));
    p = v_fma(p, f, v_set(0.3333333117f));
    vf r = v_mul(v_mul(z, f), p);
    r = v_fma(k, v_set(-2.12194440e-4f), r);
    r = v_fma(z, v_set(-0.5f), r);
    return v_fma(k, v_set(0.693359375f), v_add(f, r));
}

/* log(x) of a positive normal number, or NaN. */
INLINE vf v_log(vf x) {
    vf k, f;
    v_split(x, &k, &f);
    /* The bits above hide a NaN; the product brings it back. */
    return v_fma(x, v_set(0.0f), v_log_of_split(k, f));
}

/* log(1 + e) for e in [0, 1]. */
INLINE vf v_log1p(vf e) {
    vf u = v_add(v_set(1.0f), e);
    vf lost = v_sub(e, v_sub(u, v_set(1.0f)));
    return v_add(v_log(u), v_div(lost, u));
}

/* tanh(x) and log(1 - tanh(x)^2) = 2 (log 2 - |x| - log(1 + exp(-2 |x|))). */
INLINE vf v_tanh_with_log_jacobian(vf x, vf *log_jacobian) {
    vf size = v_abs(x), e = v_exp(v_mul(size, v_set(-2.0f)));
    vf half = v_sub(v_sub(v_set(0.693147181f), size), v_log(v_add(v_set(1.0f), e)));
    *log_jacobian = v_add(half, half);
    return v_tanh_from(x, size, e);
}

INLINE vf v_softplus(vf x) {
    return v_add(v_max(v_set(0.0f), x), v_log1p(v_exp(v_neg(v_abs(x)))));
}

/* sin and cos of an angle in turns, within half a turn of 0. */
INLINE void v_sin_cos_turn(vf turns, vf *sine, vf *cosine) {
    vf quarters = v_mul(turns, v_set(4.0f));
    vi n = v_round(quarters);
    vf r = v_sub(quarters, vi_convert(n));
    vf z = v_mul(r, r);
    vf s = v_set(0.0001581950799f); /* 5e-12 */
    s = v_fma(s, z, v_set(-0.00468126063f));
    s = v_fma(s, z, v_set(0.07969258184f));
    s = v_fma(s, z, v_set(-0.6459640961f));
    s = v_mul(v_fma(s, z, v_set(1.570796327f)), r);
    vf c = v_set(0.0009033629789f); /* 6e-11 */
    c = v_fma(c, z, v_set(-0.02085993603f));
    c = v_fma(c, z, v_set(0.2536691826f));
    c = v_fma(c, z, v_set(-1.23370054f));
    c = v_fma(c, z, v_set(1.0f));
    /* Odd quarters swap the two; bit 1 of n flips the sine, bit 1 of n + 1 the cosine. */
    vi odd = vi_sub(vi_set(0), vi_and(n, vi_set(1)));
    vi swap = vi_and(odd, vi_xor(v_bits(s), v_bits(c)));
    vi flip_s = vi_shift_left(vi_and(n, vi_set(2)), 30);
    vi flip_c = vi_shift_left(vi_and(vi_add(n, vi_set(1)), vi_set(2)), 30);
    *sine = vi_float(vi_xor(vi_xor(v_bits(s), swap), flip_s));
    *cosine = vi_float(vi_xor(vi_xor(v_bits(c), swap), flip_c));
}

INLINE vf v_erf(vf x) {
    vf size = v_abs(x), z = v_mul(x, x);
    vf p = v_set(7.853861155e-05f); /* 1.2e-9 */
    p = v_fma(p, z, v_set(-0.0008010193565f));
    p = v_fma(p, z, v_set(0.005188327679f));
    p = v_fma(p, z, v_set(-0.02685381193f));
    p = v_fma(p, z, v_set(0.1128358515f));
    p = v_fma(p, z, v_set(-0.3761262582f));
    vf near = v_mul(x, v_fma(p, z, v_set(1.128379166f)));
    /* Beyond 1: 1 - exp(-x^2) erfcx(|x|), erfcx by powers of 1 / (1 + |x| / 2). */
    vf t = v_div(v_set(1.0f), v_fma(size, v_set(0.5f), v_set(1.0f)));
    vf q = v_set(0.08089074421f); /* 6e-9 */
    q = v_fma(q, t, v_set(-0.1850391847f));
    q = v_fma(q, t, v_set(0.02505819569f));
    q = v_fma(q, t, v_set(0.1053442973f));
    q = v_fma(q, t, v_set(0.1580405842f));
    q = v_fma(q, t, v_set(0.2529675991f));
    q = v_fma(q, t, v_set(0.2809907318f));
    q = v_fma(q, t, v_set(0.2821994105f));
    q = v_fma(q, t, v_set(-4.103543075e-06f));
    vf far = v_fnma(v_exp(v_neg(z)), q, v_set(1.0f));
    return v_select(v_lt(size, v_set(1.0f)), near, v_copy_sign(far, x));
}

#endif

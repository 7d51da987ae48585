/* Random numbers of a walk: Philox4x32-10 (Salmon et al., 2011) and Box-Muller.
 *
 * One stream whatever the backend, tile or thread: key = the call's 64-bit seed, counter = (row,
 * step from the walk's start, head << 16 | block, 0). A block of four words gives four normals
 * (features 4 * block and on); block 0 of HEAD_UNIFORM gives the uniforms of action, delta, stop.
 */
#ifndef RECALL_PHILOX_H
#define RECALL_PHILOX_H

#include "functions.h"

enum { HEAD_ACTION = 0, HEAD_DELTA = 1, HEAD_UNIFORM = 2 };
enum { WORD_ACTION = 0, WORD_DELTA = 1, WORD_STOP = 2 };

#define PHILOX_ROUNDS 10
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

/* The keys of all rounds, once for each lane. */
typedef struct {
    uint32_t key[PHILOX_ROUNDS][2][LANES];
} philox_keys;

INLINE void schedule_keys(philox_keys *keys, uint64_t seed) {
    for (uint32_t round = 0; round < PHILOX_ROUNDS; round++) {
        /* Products, as GCC 12 at -O3 takes one of two running sums for the other. */
        vi_store(keys->key[round][0], vi_set((uint32_t)seed + round * PHILOX_W0));
        vi_store(keys->key[round][1], vi_set((uint32_t)(seed >> 32) + round * PHILOX_W1));
    }
}

#if RECALL_ISA
/* Words live in the lower halves of 64-bit lanes; what the upper halves hold is never read. */
INLINE void philox_half(vi c0, vi c1, vi c2, const philox_keys *keys, vi out[4]) {
    vi c3 = vi_set(0), m0 = vi_set(PHILOX_M0), m1 = vi_set(PHILOX_M1);
    UNROLLED for (int round = 0; round < PHILOX_ROUNDS; round++) {
        vi p0 = vi_wide_product(c0, m0), p1 = vi_wide_product(c2, m1);
        c0 = vi_xor3(vi_upper_half(p1), c1, vi_load(keys->key[round][0]));
        c2 = vi_xor3(vi_upper_half(p0), c3, vi_load(keys->key[round][1]));
        c1 = p1;
        c3 = p0;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

INLINE void philox(vi row, vi step, uint32_t block, const philox_keys *keys, vi out[4]) {
    vi even[4], odd[4];
    philox_half(row, step, vi_set(block), keys, even);
    philox_half(vi_upper_half(row), vi_upper_half(step), vi_set(block), keys, odd);
    for (int i = 0; i < 4; i++) out[i] = vi_even_odd(even[i], vi_lower_to_upper(odd[i]));
}
#else
INLINE void philox(vi row, vi step, uint32_t block, const philox_keys *keys, vi out[4]) {
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t c0 = LANE(row, lane), c1 = LANE(step, lane), c2 = block, c3 = 0;
        for (int round = 0; round < PHILOX_ROUNDS; round++) {
            uint64_t p0 = (uint64_t)PHILOX_M0 * c0, p1 = (uint64_t)PHILOX_M1 * c2;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ keys->key[round][0][lane];
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ keys->key[round][1][lane];
            c1 = (uint32_t)p1;
            c3 = (uint32_t)p0;
        }
        LANE(out[0], lane) = c0;
        LANE(out[1], lane) = c1;
        LANE(out[2], lane) = c2;
        LANE(out[3], lane) = c3;
    }
}
#endif

/* Two standard normals from two words: 31 bits of radius (6.6 sigma at most), 32 of angle. */
INLINE void box_muller(vi a, vi b, vf *first, vf *second) {
    vf u = v_fma(vi_convert(vi_shift_right(a, 1)), v_set(4.656612873e-10f), v_set(2.328306437e-10f));
    vf radius = v_sqrt(v_mul(v_log(u), v_set(-2.0f)));
    vf sine, cosine;
    v_sin_cos_turn(v_mul(vi_convert(b), v_set(2.328306437e-10f)), &sine, &cosine);
    *first = v_mul(radius, cosine);
    *second = v_mul(radius, sine);
}

INLINE vf uniform(vi word) {
    return v_mul(vi_convert(vi_shift_right(word, 8)), v_set(5.960464478e-8f));
}

#endif

/* What one core can do at best: multiply-adds a second, and seconds for a normal random number.
 *
 * Prints JSON: "peak" in FLOP/s (two a multiply-add), "random" in seconds, and the mean and the
 * variance of the numbers drawn. The fastest of many trials counts. Knows nothing of our kernel.
 */
#define _POSIX_C_SOURCE 199309L
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Widest registers, and enough independent chains to hide the latency of a multiply-add. */
#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#else
#define BYTES 16
#define CHAINS 24
#endif
#define LANES (BYTES / 4)
#define BLOCK 256
#define TRIALS 100

typedef float floats __attribute__((vector_size(BYTES)));

static volatile float keep;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double multiply_adds(void) {
    const int repeats = 20000;
    floats chain[CHAINS], scale, shift;
    for (int j = 0; j < LANES; j++) scale[j] = 0.999f - 1e-9f * keep, shift[j] = 1e-3f;
    for (int k = 0; k < CHAINS; k++) chain[k] = shift * (float)k;
    const double begin = now();
    for (int i = 0; i < repeats; i++) {
#pragma GCC unroll 24
        for (int k = 0; k < CHAINS; k++) chain[k] = chain[k] * scale + shift;
    }
    const double seconds = now() - begin;
    for (int k = 1; k < CHAINS; k++) chain[0] += chain[k];
    keep = chain[0][0];
    return 2.0 * repeats * CHAINS * LANES / seconds;
}

/* Philox4x32-10 (Salmon et al., 2011), a counter a lane. */
static void philox(uint32_t word[4][BLOCK], uint32_t first, uint32_t seed) {
    for (int j = 0; j < BLOCK; j++) {
        uint32_t a = first + j, b = 1, c = 2, d = 3, k = seed, l = 12345;
        for (int i = 0; i < 10; i++, k += 0x9E3779B9u, l += 0xBB67AE85u) {
            const uint64_t p = (uint64_t)0xD2511F53u * a, q = (uint64_t)0xCD9E8D57u * c;
            a = (uint32_t)(q >> 32) ^ b ^ k, b = (uint32_t)q;
            c = (uint32_t)(p >> 32) ^ d ^ l, d = (uint32_t)p;
        }
        word[0][j] = a, word[1][j] = b, word[2][j] = c, word[3][j] = d;
    }
}

/* Box and Muller, 1958: two uniform numbers make two normal ones. */
static void normals(const uint32_t *u, const uint32_t *v, float *x, float *y) {
    for (int j = 0; j < BLOCK; j++) {
        /* -2 log of a number in (0, 1]: exponent apart, the rest by its series around 1. */
        const float uniform = (float)((int32_t)(u[j] >> 8) + 1) * 0x1p-24f;
        int32_t bits;
        memcpy(&bits, &uniform, 4);
        const int32_t exponent = (bits - 0x3F3504F3) >> 23;
        bits -= exponent << 23;
        float m;
        memcpy(&m, &bits, 4);
        const float s = (m - 1) / (m + 1), s2 = s * s;
        const float log_m = 2 * s * (1 + s2 * (1 / 3.f + s2 * (1 / 5.f + s2 / 7.f)));
        const float square = -2 * (0.69314718f * (float)exponent + log_m);
        const float radius = sqrtf(square > 0 ? square : 0);
        /* A quarter of the circle and an angle within 45 degrees of its middle. */
        const uint32_t quarter = v[j] >> 30;
        const float z = 1.57079633f * ((float)(int32_t)(v[j] << 2 >> 8) * 0x1p-24f - 0.5f);
        const float z2 = z * z;
        const float sine = z * (1 + z2 * (-1 / 6.f + z2 * (1 / 120.f - z2 / 5040.f)));
        const float cosine = 1 + z2 * (-0.5f + z2 * (1 / 24.f + z2 * (-1 / 720.f + z2 / 40320.f)));
        const float p = (quarter & 1) ? -sine : cosine, q = (quarter & 1) ? cosine : sine;
        x[j] = radius * ((quarter & 2) ? -p : p);
        y[j] = radius * ((quarter & 2) ? -q : q);
    }
}

static uint32_t word[4][BLOCK];
static float drawn[4][BLOCK];

static double random_seconds(uint32_t seed, double sums[2]) {
    const int repeats = 200;
    const double begin = now();
    for (int i = 0; i < repeats; i++) {
        philox(word, i * BLOCK, seed);
        normals(word[0], word[1], drawn[0], drawn[1]);
        normals(word[2], word[3], drawn[2], drawn[3]);
        keep = drawn[0][i % BLOCK] + drawn[2][0];
    }
    const double seconds = now() - begin;
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < BLOCK; j++) {
            sums[0] += drawn[k][j];
            sums[1] += (double)drawn[k][j] * drawn[k][j];
        }
    return seconds / (4.0 * BLOCK * repeats);
}

int main(void) {
    double peak = 0, seconds = 1, sums[2] = {0, 0};
    for (int trial = 0; trial < TRIALS; trial++) {
        const double rate = multiply_adds(), each = random_seconds(trial, sums);
        if (rate > peak) peak = rate;
        if (each < seconds) seconds = each;
    }
    const double count = 4.0 * BLOCK * TRIALS, mean = sums[0] / count;
    printf("{\"peak\": %.6g, \"random\": %.6g, \"mean\": %.6g, \"variance\": %.6g}\n", peak,
           seconds, mean, sums[1] / count - mean * mean);
    return 0;
}

/* The type of a tensor's entries, read as float and written back, and what all kernels share.

   Compiled once for bfloat16 (-DBFLOAT16) and once for float: sums and functions are float in both. */

#pragma once

/* Tile registers (AMX), and an operating system that is known to lend them. */
#if defined(BFLOAT16) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t number;

static inline float load(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, halves to even. What is no number stays none: the lower half of its bits is 0, as in whatever
   bfloat16 it came from and in the processor's own, so that rounding up cannot overflow. */
static inline number store(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (number)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float number;

static inline float load(number x) { return x; }
static inline number store(float x) { return x; }
#endif

/* e to the x, to 2 units in the last place, 0 below -87.7: 2^n times 2^f with |f| <= 1/2, the latter by its Taylor
   series. Unlike expf it is computed for a whole vector at once. */
static inline float exponential(float x) {
    float bounded = x > -88.0f ? x : -88.0f;
    float scaled = (bounded < 88.0f ? bounded : 88.0f) * 1.44269504f;
    float whole = rintf(scaled);
    float f = (scaled - whole) * 0.69314718f;
    float series = 1.0f + f * (1.0f + f * (0.5f + f * (0.16666667f + f * (0.041666668f
                 + f * (0.0083333338f + f * 0.0013888889f)))));
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23; /* n = -127 makes a zero */
    float power;
    memcpy(&power, &bits, sizeof power);
    /* Comparisons drop what is no number: it must come through. */
    return x != x ? x : series * power;
}

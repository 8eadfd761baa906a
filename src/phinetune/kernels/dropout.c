/* Masks of dropout, one bit an entry: drawn 64 entries at a time, and applied to whole entries. */

#include "number.h"

#define LANES 8
#define CHUNK (LANES * 128) /* words that share a seed: what is drawn does not hang on the threads */

static inline uint64_t mixed(uint64_t x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* SFC64 (Chris Doty-Humphrey), one generator a lane. */
typedef struct {
    uint64_t a[LANES], b[LANES], c[LANES], count[LANES];
} generators;

static inline void next_words(generators *g, uint64_t *words) {
    for (int lane = 0; lane < LANES; lane++) {
        words[lane] = g->a[lane] + g->b[lane] + g->count[lane]++;
        g->a[lane] = g->b[lane] ^ g->b[lane] >> 11;
        g->b[lane] = g->c[lane] + (g->c[lane] << 3);
        g->c[lane] = (g->c[lane] << 24 | g->c[lane] >> 40) + words[lane];
    }
}

/* A bit is set where eight random bits, read as a number, reach the threshold (1 to 255). The numbers are
   compared 64 at a time, from the lowest bit up: where the threshold has a 1 the number needs one too and the lower bits
   must reach theirs; where it has a 0, a 1 is enough. */
void draw_mask(uint64_t *mask, int64_t num_words, uint64_t seed, int64_t threshold, int threads) {
    int lowest = __builtin_ctzll(threshold);
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < num_words; start += CHUNK) {
        generators g;
        uint64_t drawn[LANES], kept[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            g.a[lane] = mixed(seed ^ mixed(start + lane));
            g.b[lane] = mixed(g.a[lane]);
            g.c[lane] = mixed(g.b[lane]);
            g.count[lane] = 1;
        }
        for (int i = 0; i < 12; i++) next_words(&g, drawn);
        for (int64_t at = start; at < start + CHUNK && at < num_words; at += LANES) {
            next_words(&g, kept);
            for (int bit = lowest + 1; bit < 8; bit++) {
                next_words(&g, drawn);
                if (threshold >> bit & 1)
                    for (int lane = 0; lane < LANES; lane++) kept[lane] &= drawn[lane];
                else
                    for (int lane = 0; lane < LANES; lane++) kept[lane] |= drawn[lane];
            }
            for (int lane = 0; lane < LANES && at + lane < num_words; lane++) mask[at + lane] = kept[lane];
        }
    }
}

/* x with the entries dropped whose bit is not set: bit i of the mask does for entry i. */
void drop(const number *x, const uint32_t *mask, number *out, int64_t num_entries, int threads) {
    int64_t piece = 1 << 13;
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < num_entries; start += piece) {
        int64_t end = start + piece < num_entries ? start + piece : num_entries, i = start;
        for (; i + 32 <= end; i += 32) {
            uint32_t kept = mask[i / 32];
            for (int bit = 0; bit < 32; bit++) out[i + bit] = kept >> bit & 1 ? x[i + bit] : 0;
        }
        for (; i < end; i++) out[i] = mask[i / 32] >> i % 32 & 1 ? x[i] : 0;
    }
}

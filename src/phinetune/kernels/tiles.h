/* Blocks of 32 x 32 sums in the tile registers of AMX, and matrices laid out as these want them.

   A strip is 32 rows of a left factor, or 32 columns of a right one, cut into steps of 32 along the sum: 2 KB a step,
   one tile of 16 rows (columns) after the other. A tile of a right factor holds pairs along the sum side by
   side. What fills a strip up is 0. Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20. */

#pragma once

#include <immintrin.h>

#include "number.h"

#define SIDE 32                          /* rows and columns of a block, and a step along the sum */
#define STEP (SIDE * SIDE)               /* entries of a strip's step */
#define STEPS(size) (((size) + SIDE - 1) / SIDE)
#define FENCE __asm__ volatile("" ::: "memory") /* the intrinsics do not say that they read and write memory */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* All eight tiles: 16 rows of 64 bytes. */
static inline void claim_tiles(void) {
    struct { uint8_t palette, start, unused[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void load_sums(const float *block) {
    FENCE;
    _tile_loadd(0, block, 4 * SIDE);
    _tile_loadd(1, block + 16, 4 * SIDE);
    _tile_loadd(2, block + 16 * SIDE, 4 * SIDE);
    _tile_loadd(3, block + 16 * SIDE + 16, 4 * SIDE);
}

static inline void store_sums(float *block) {
    _tile_stored(0, block, 4 * SIDE);
    _tile_stored(1, block + 16, 4 * SIDE);
    _tile_stored(2, block + 16 * SIDE, 4 * SIDE);
    _tile_stored(3, block + 16 * SIDE + 16, 4 * SIDE);
    FENCE;
}

static inline void add_products(const number *left, const number *right, int64_t num_steps) {
    FENCE;
    for (const number *end = left + num_steps * STEP; left < end; left += STEP, right += STEP) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + STEP / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + STEP / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* The lowest `count` of 32 bits, all or none where it is beyond. */
static inline uint32_t first_bits(int64_t count) {
    return count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1;
}

/* Which of 32 entries from `at` on a mask keeps, one bit an entry; all where there is none. at is a multiple of 32. */
static inline uint32_t kept_bits(const uint32_t *mask, int64_t at) { return mask ? mask[at / 32] : 0xffffffff; }

/* Some rows, at most 32, as a strip of a left factor. mask_at is the first row's first entry in the mask. */
static inline void lay_rows(const number *from, int64_t stride, int64_t num_rows, int64_t depth, const uint32_t *mask,
                            int64_t mask_at, int64_t mask_stride, number *to) {
    for (int64_t row = 0; row < SIDE; row++, from += stride, mask_at += mask_stride)
        for (int64_t at = 0; at < depth; at += SIDE) {
            uint32_t kept = row < num_rows ? first_bits(depth - at) & kept_bits(mask, mask_at + at) : 0;
            _mm512_store_si512(to + (at + row) * SIDE, _mm512_maskz_loadu_epi16(kept, from + at));
        }
}

/* One step of strips of a right factor (depth, columns), `strip` entries apart: `num_rows` rows of it, at most 32, one
   pair after the other: memory is fast where lines follow each other. */
static inline void lay_columns(const number *from, int64_t stride, int64_t num_rows, int64_t num_columns,
                               const uint32_t *mask, int64_t mask_at, int64_t mask_stride, number *to, int64_t strip) {
    for (int64_t row = 0; row < SIDE; row += 2, from += 2 * stride, mask_at += 2 * mask_stride, to += SIDE)
        for (int64_t at = 0; at < num_columns; at += SIDE) {
            uint32_t first = 0, second = 0, inside = first_bits(num_columns - at);
            if (row < num_rows) first = inside & kept_bits(mask, mask_at + at);
            if (row + 1 < num_rows) second = inside & kept_bits(mask, mask_at + mask_stride + at);
            for (int half = 0; half < 2; half++, first >>= 16, second >>= 16) {
                const number *pair = from + at + 16 * half;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, pair));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, pair + stride));
                _mm512_store_si512(to + at / SIDE * strip + half * STEP / 2,
                                   _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}

/* 16 rows of 16 pairs of entries become columns. */
static inline void transpose_pairs(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            r[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + half + 2]);
            r[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + half + 2]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* One step of one strip of a right factor that lies in rows (columns, depth): `num_rows` entries of each column. */
static inline void lay_rows_as_columns(const number *from, int64_t stride, int64_t num_rows, int64_t num_columns,
                                       number *to) {
    for (int64_t first = 0; first < SIDE; first += 16, to += STEP / 2) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++) {
            uint32_t kept = first + i < num_columns ? first_bits(num_rows) : 0;
            rows[i] = _mm512_maskz_loadu_epi16(kept, from + (first + i) * stride);
        }
        transpose_pairs(rows);
        for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + SIDE * i, rows[i]);
    }
}

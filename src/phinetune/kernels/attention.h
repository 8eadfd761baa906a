/* What the parts of attention share: what is computed, what a thread works in, and which keys a row sees. */

#pragma once

#include "tiles.h"

/* Heads of tokens: an entry is at head * head_stride + token * token_stride + entry. */
typedef struct {
    number *at;
    int64_t head_stride, token_stride;
} heads;

typedef struct {
    int64_t start, length, prefix_start, prefix_length; /* tokens; the prefix's are anywhere in the batch */
} segment;

/* q, out and their gradients have `group` heads for each of the num_heads of k and v. `sums` holds the binary
   logarithm of the sum of the exponentials of scores, for each query head and token. Segments of a family follow each
   other, one that others continue is the last; family f begins with segment families[f]. window 0, softcap 0: none. */
typedef struct {
    heads q, k, v, out, d_out, dq, dk, dv;
    float *sums;
    const segment *segments;
    const int64_t *families;
    int64_t num_families, num_tokens, num_heads, group, size, window;
    float scale, softcap;
} attention;

/* What one thread works in; strips as tiles.h lays them out. */
typedef struct {
    number *rows, *keys, *values;    /* forward: the rows of one strip, keys as columns, values as rows of the sum */
    number *key_rows, *value_rows;   /* backward, for each strip of keys */
    number *q_columns, *q_steps, *d_columns, *d_steps; /* q and d_out, of all rows */
    number *shares, *d_scores;       /* probabilities and gradient of scores, of a strip of keys by all rows */
    number *d_score_rows;            /* the latter for each strip of rows by all keys */
    float *blocks;                   /* scores */
    float *dk, *dv, *prefix_dk, *prefix_dv, *deltas, *row_sums;
} room;

/* One head of k and v, and the query heads that read it: set out and sums of a segment's rows. */
void attend_segment(const attention *a, const segment *s, int64_t head, room *r);

/* Set dq of a segment's rows; r->dk and r->dv become the gradients of its own keys, or are added to those of the prefix
   where it is one; what its rows read of a prefix is added to r->prefix_dk and r->prefix_dv. */
void attend_segment_back(const attention *a, const segment *s, int64_t head, int is_prefix, room *r);

#define LOG2_E 1.44269504f

/* 2 to the x, 0 below -127: to 2 units in the last place by the Taylor series of 2^f, |f| <= 1/2. */
static inline __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.69314718f)), sum = _mm512_set1_ps(1 / 720.0f);
    const float terms[] = {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, whole);
}

/* c tanh(x / c) = c - 2 c / (1 + e^(2 x / c)) */
static inline __m512 capped(__m512 x, float cap) {
    __m512 e = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2_E / cap)));
    __m512 share = _mm512_div_ps(_mm512_set1_ps(2 * cap), _mm512_add_ps(e, _mm512_set1_ps(1)));
    return _mm512_sub_ps(_mm512_set1_ps(cap), share);
}

/* Bits begin to end of 32. */
static inline uint32_t bits_between(int64_t begin, int64_t end) { return first_bits(end) & ~first_bits(begin); }

/* Strips of keys: the prefix's, then the segment's own. */
static inline int64_t prefix_strips(const segment *s) { return STEPS(s->prefix_length); }
static inline int64_t key_strips(const segment *s) { return prefix_strips(s) + STEPS(s->length); }

/* A strip of keys: its first token, its number of tokens, and the position of the first. */
typedef struct {
    int64_t token, count, position;
} stretch;

static inline stretch keys_of(const segment *s, int64_t strip) {
    int64_t own = strip - prefix_strips(s), at = (own < 0 ? strip : own) * SIDE;
    if (own < 0) return (stretch){s->prefix_start + at, smaller(SIDE, s->prefix_length - at), at};
    return (stretch){s->start + at, smaller(SIDE, s->length - at), s->prefix_length + at};
}

/* The strips of keys that some row of a strip of rows sees: from the first to before the last. */
static inline int64_t first_seen(const attention *a, const segment *s, int64_t row_strip) {
    int64_t position = a->window ? larger(0, s->prefix_length + row_strip * SIDE - a->window + 1) : 0;
    return position < s->prefix_length ? position / SIDE : prefix_strips(s) + (position - s->prefix_length) / SIDE;
}
static inline int64_t end_seen(const segment *s, int64_t row_strip) { return prefix_strips(s) + row_strip + 1; }

/* Where a strip of rows begins among the gradients of scores: every one has room for what it sees without a window. */
static inline int64_t strips_before(const segment *s, int64_t row_strip) {
    return row_strip * prefix_strips(s) + row_strip * (row_strip + 1) / 2;
}

static inline const number *place(const heads *h, int64_t head, int64_t token) {
    return h->at + head * h->head_stride + token * h->token_stride;
}

static inline void write_rows(const float *block, const float *factors, int64_t num_rows, int64_t num_columns,
                              number *to, int64_t stride) {
    for (int64_t row = 0; row < num_rows; row++, block += SIDE, to += stride) {
        __m512 factor = _mm512_set1_ps(factors ? factors[row] : 1);
        __m512 low = _mm512_mul_ps(_mm512_load_ps(block), factor);
        __m512 high = _mm512_mul_ps(_mm512_load_ps(block + 16), factor);
        _mm512_mask_storeu_epi16(to, first_bits(num_columns), (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* A head's entries of some tokens, as rows of a left factor; as columns of a right one; as rows of a right one, whose
   strips are `strip` entries apart. */
static inline void lay_heads(const number *from, int64_t stride, int64_t count, int64_t size, number *rows,
                             number *columns, number *steps, int64_t strip) {
    if (rows) lay_rows(from, stride, count, size, 0, 0, 0, rows);
    if (steps) lay_columns(from, stride, count, size, 0, 0, 0, steps, strip);
    for (int64_t at = 0; columns && at < size; at += SIDE)
        lay_rows_as_columns(from + at, stride, size - at, count, columns + at * SIDE);
}

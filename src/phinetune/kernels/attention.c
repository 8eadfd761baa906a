/* Attention of segments in the tile registers of AMX, and its way back.

   A segment's rows see its own keys up to their own position, and those of a prefix before them. One thread computes
   one key head of a family: a prefix and all segments that continue it, or a segment that continues nothing.
   Nothing but out and the logarithms of the rows' sums is kept for the way back. FlashAttention-2 (arXiv 2307.08691),
   section 3, without its blocks of keys: all scores of 32 rows fit into the cache. */

#if defined(BFLOAT16) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <omp.h>

#include "tiles.h"

/* Heads of tokens: an entry is at head * head_stride + token * token_stride + entry. */
typedef struct {
    number *at;
    int64_t head_stride, token_stride;
} heads;

typedef struct {
    int64_t start, length, prefix_start, prefix_length; /* tokens; the prefix's are anywhere in the batch */
} segment;

/* q, out and their gradients have `group` heads for each of the num_heads of k and v. `sums` holds log2 of the sum of 2 to
   the scores for each query head and token. Segments of a family follow each other, one that others
   continue is the last; family f begins with segment families[f]. window 0, softcap 0: none. */
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
    float *blocks, *dk, *dv, *prefix_dk, *prefix_dv, *deltas, *row_sums;
} room;

#define LOG2_E 1.44269504f

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
    int64_t own = strip - prefix_strips(s);
    if (own < 0) return (stretch){s->prefix_start + strip * SIDE, smaller(SIDE, s->prefix_length - strip * SIDE), strip * SIDE};
    return (stretch){s->start + own * SIDE, smaller(SIDE, s->length - own * SIDE), s->prefix_length + own * SIDE};
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
static void lay_heads(const number *from, int64_t stride, int64_t count, int64_t size, number *rows, number *columns,
                      number *steps, int64_t strip) {
    if (rows) lay_rows(from, stride, count, size, 0, 0, 0, rows);
    if (steps) lay_columns(from, stride, count, size, 0, 0, 0, steps, strip);
    for (int64_t at = 0; columns && at < size; at += SIDE)
        lay_rows_as_columns(from + at, stride, size - at, count, columns + at * SIDE);
}

/* Scores of a strip of rows, one block for each strip of keys, become probabilities by 2 to the power of what they are
   more than the greatest, as a left factor's strip. Returns nothing: factors are 1 / sum. */
static void softmax_rows(const attention *a, const segment *s, int64_t row_strip, int64_t first, int64_t end,
                         float *blocks, number *shares, float *factors, float *sums) {
    float scale = a->scale * LOG2_E;
    for (int64_t row = 0; row < SIDE; row++) {
        int64_t position = s->prefix_length + row_strip * SIDE + row;
        __m512 most = _mm512_set1_ps(-3e38f), sum = _mm512_setzero_ps();
        for (int64_t strip = first; strip < end; strip++) {
            stretch keys = keys_of(s, strip);
            int64_t begin = a->window ? position - a->window + 1 - keys.position : 0;
            uint32_t seen = bits_between(begin, smaller(keys.count, position + 1 - keys.position));
            float *score = blocks + (strip - first) * STEP + row * SIDE;
            for (int half = 0; half < 2; half++, score += 16, seen >>= 16) {
                __m512 x = _mm512_load_ps(score);
                if (a->softcap != 0)
                    x = _mm512_mul_ps(capped(_mm512_mul_ps(x, _mm512_set1_ps(a->scale)), a->softcap), _mm512_set1_ps(LOG2_E));
                else
                    x = _mm512_mul_ps(x, _mm512_set1_ps(scale));
                x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-3e38f), x);
                most = _mm512_max_ps(most, x);
                _mm512_store_ps(score, x);
            }
        }
        float greatest = _mm512_reduce_max_ps(most);
        for (int64_t strip = first; strip < end; strip++) {
            const float *score = blocks + (strip - first) * STEP + row * SIDE;
            __m512 low = power_of_two(_mm512_sub_ps(_mm512_load_ps(score), _mm512_set1_ps(greatest)));
            __m512 high = power_of_two(_mm512_sub_ps(_mm512_load_ps(score + 16), _mm512_set1_ps(greatest)));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            _mm512_store_si512(shares + (strip - first) * STEP + row * SIDE, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        float total = _mm512_reduce_add_ps(sum);
        factors[row] = 1 / total;
        sums[row] = greatest + log2f(total);
    }
}

static void attend_segment(const attention *a, const segment *s, int64_t head, room *r) {
    int64_t strip = key_strips(s) * STEP, wide = STEPS(a->size);
    for (int64_t j = 0; j < key_strips(s); j++) {
        stretch keys = keys_of(s, j);
        lay_heads(place(&a->k, head, keys.token), a->k.token_stride, keys.count, a->size, 0, r->keys + j * wide * STEP, 0, 0);
        lay_heads(place(&a->v, head, keys.token), a->v.token_stride, keys.count, a->size, 0, 0, r->values + j * STEP, strip);
    }
    for (int64_t query = head * a->group; query < (head + 1) * a->group; query++)
        for (int64_t i = 0; i < STEPS(s->length); i++) {
            int64_t token = s->start + i * SIDE, count = smaller(SIDE, s->length - i * SIDE);
            int64_t first = first_seen(a, s, i), end = end_seen(s, i);
            float factors[SIDE], sums[SIDE];
            lay_heads(place(&a->q, query, token), a->q.token_stride, count, a->size, r->rows, 0, 0, 0);
            for (int64_t j = first; j < end; j++) {
                zero_sums();
                add_products(r->rows, r->keys + j * wide * STEP, wide);
                store_sums(r->blocks + (j - first) * STEP);
            }
            softmax_rows(a, s, i, first, end, r->blocks, r->shares, factors, sums);
            memcpy(a->sums + query * a->num_tokens + token, sums, count * sizeof(float));
            for (int64_t part = 0; part < wide; part++) {
                zero_sums();
                add_products(r->shares, r->values + part * strip + first * STEP, end - first);
                store_sums(r->blocks);
                write_rows(r->blocks, factors, count, a->size - part * SIDE,
                           (number *)place(&a->out, query, token) + part * SIDE, a->out.token_stride);
            }
        }
}

/* Rows of a block by columns: 32 rows of 32 entries to their transpose. */
static void transpose(const number *from, number *to) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                          22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = _mm512_load_si512(from + i * SIDE);
        high[i] = _mm512_load_si512(from + (i + 16) * SIDE);
    }
    transpose_pairs(low);
    transpose_pairs(high);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(to + 2 * i * SIDE, _mm512_permutex2var_epi16(low[i], even, high[i]));
        _mm512_store_si512(to + (2 * i + 1) * SIDE,
                           _mm512_permutex2var_epi16(low[i], _mm512_add_epi16(even, _mm512_set1_epi16(1)), high[i]));
    }
}

/* Blocks of scores and of the probabilities' gradient, both keys by rows: probabilities and the scores' gradient. */
static void score_gradients(const attention *a, const segment *s, int64_t strip, int64_t row_strip, const room *r,
                            const float *scores, const float *d_shares) {
    stretch keys = keys_of(s, strip);
    const float *sums = r->row_sums + row_strip * SIDE, *deltas = r->deltas + row_strip * SIDE;
    int64_t position = s->prefix_length + row_strip * SIDE, count = s->length - row_strip * SIDE;
    number *shares = r->shares + row_strip * STEP, *d_scores = r->d_scores + row_strip * STEP;
    for (int64_t key = 0; key < SIDE; key++, scores += SIDE, d_shares += SIDE, shares += SIDE, d_scores += SIDE) {
        int64_t begin = keys.position + key - position, end = a->window ? smaller(count, begin + a->window) : count;
        uint32_t seen = key < keys.count ? bits_between(begin, end) : 0;
        __m512 p[2], d[2];
        for (int half = 0; half < 2; half++, seen >>= 16) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + 16 * half), _mm512_set1_ps(a->scale)), slope = _mm512_set1_ps(a->scale);
            if (a->softcap != 0) {
                x = capped(x, a->softcap);
                __m512 share = _mm512_div_ps(x, _mm512_set1_ps(a->softcap));
                slope = _mm512_mul_ps(slope, _mm512_fnmadd_ps(share, share, _mm512_set1_ps(1)));
            }
            x = _mm512_fmsub_ps(x, _mm512_set1_ps(LOG2_E), _mm512_loadu_ps(sums + 16 * half));
            p[half] = _mm512_maskz_mov_ps(seen, power_of_two(x));
            __m512 more = _mm512_sub_ps(_mm512_load_ps(d_shares + 16 * half), _mm512_loadu_ps(deltas + 16 * half));
            d[half] = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(p[half], more), slope);
        }
        _mm512_store_si512(shares, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
        _mm512_store_si512(d_scores, (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]));
    }
}

static void lay_queries(const attention *a, const segment *s, int64_t query, room *r) {
    int64_t num_strips = STEPS(s->length), wide = STEPS(a->size);
    for (int64_t i = 0; i < num_strips; i++) {
        int64_t token = s->start + i * SIDE, count = smaller(SIDE, s->length - i * SIDE);
        const number *q = place(&a->q, query, token), *d = place(&a->d_out, query, token);
        const number *out = place(&a->out, query, token);
        lay_heads(q, a->q.token_stride, count, a->size, 0, r->q_columns + i * wide * STEP, r->q_steps + i * STEP, num_strips * STEP);
        lay_heads(d, a->d_out.token_stride, count, a->size, 0, r->d_columns + i * wide * STEP, r->d_steps + i * STEP, num_strips * STEP);
        for (int64_t row = 0; row < SIDE; row++) {
            float delta = 0;
            if (row < count)
#pragma omp simd reduction(+ : delta)
                for (int64_t at = 0; at < a->size; at++)
                    delta += load(out[row * a->out.token_stride + at]) * load(d[row * a->d_out.token_stride + at]);
            r->deltas[i * SIDE + row] = delta;
            r->row_sums[i * SIDE + row] = row < count ? a->sums[query * a->num_tokens + token + row] : 0;
        }
    }
}

/* Add products over strips of rows to the gradient of a strip of keys or values. */
static void add_gradient(const number *left, const number *right, int64_t strip, int64_t begin, int64_t end, int64_t wide,
                         float *sums) {
    for (int64_t part = 0; part < wide; part++) {
        load_sums(sums + part * STEP);
        add_products(left + begin * STEP, right + part * strip + begin * STEP, end - begin);
        store_sums(sums + part * STEP);
    }
}

static void attend_segment_back(const attention *a, const segment *s, int64_t head, int is_prefix, room *r) {
    int64_t num_keys = key_strips(s), num_rows = STEPS(s->length), wide = STEPS(a->size), ahead = prefix_strips(s);
    float *own_dk = is_prefix ? r->prefix_dk : r->dk, *own_dv = is_prefix ? r->prefix_dv : r->dv;
    if (!is_prefix) {
        memset(r->dk, 0, num_rows * wide * STEP * sizeof(float));
        memset(r->dv, 0, num_rows * wide * STEP * sizeof(float));
    }
    for (int64_t j = 0; j < num_keys; j++) {
        stretch keys = keys_of(s, j);
        lay_heads(place(&a->k, head, keys.token), a->k.token_stride, keys.count, a->size, r->key_rows + j * wide * STEP, 0,
                  r->keys + j * STEP, num_keys * STEP);
        lay_heads(place(&a->v, head, keys.token), a->v.token_stride, keys.count, a->size, r->value_rows + j * wide * STEP, 0, 0, 0);
    }
    for (int64_t query = head * a->group; query < (head + 1) * a->group; query++) {
        lay_queries(a, s, query, r);
        for (int64_t j = 0; j < num_keys; j++) {
            int64_t begin = num_rows, end = 0; /* the strips of rows that see this one */
            for (int64_t i = larger(0, j - ahead); i < num_rows && first_seen(a, s, i) <= j; i++) {
                float *scores = r->blocks, *d_shares = r->blocks + STEP;
                zero_sums();
                add_products(r->key_rows + j * wide * STEP, r->q_columns + i * wide * STEP, wide);
                store_sums(scores);
                zero_sums();
                add_products(r->value_rows + j * wide * STEP, r->d_columns + i * wide * STEP, wide);
                store_sums(d_shares);
                score_gradients(a, s, j, i, r, scores, d_shares);
                transpose(r->d_scores + i * STEP, r->d_score_rows + (strips_before(s, i) + j) * STEP);
                begin = smaller(begin, i), end = i + 1;
            }
            if (begin >= end) continue;
            float *dk = j < ahead ? r->prefix_dk + j * wide * STEP : own_dk + (j - ahead) * wide * STEP;
            float *dv = j < ahead ? r->prefix_dv + j * wide * STEP : own_dv + (j - ahead) * wide * STEP;
            add_gradient(r->shares, r->d_steps, num_rows * STEP, begin, end, wide, dv);
            add_gradient(r->d_scores, r->q_steps, num_rows * STEP, begin, end, wide, dk);
        }
        for (int64_t i = 0; i < num_rows; i++) {
            int64_t token = s->start + i * SIDE, first = first_seen(a, s, i), end = end_seen(s, i);
            for (int64_t part = 0; part < wide; part++) {
                zero_sums();
                add_products(r->d_score_rows + (strips_before(s, i) + first) * STEP,
                             r->keys + part * num_keys * STEP + first * STEP, end - first);
                store_sums(r->blocks);
                write_rows(r->blocks, 0, smaller(SIDE, s->length - i * SIDE), a->size - part * SIDE,
                           (number *)place(&a->dq, query, token) + part * SIDE, a->dq.token_stride);
            }
        }
    }
}

/* Gradients of a stretch of keys and values to their places. */
static void write_gradients(const attention *a, int64_t head, int64_t start, int64_t length, const float *dk,
                            const float *dv) {
    for (int64_t j = 0; j < STEPS(length); j++)
        for (int64_t part = 0; part < STEPS(a->size); part++, dk += STEP, dv += STEP) {
            int64_t token = start + j * SIDE, count = smaller(SIDE, length - j * SIDE), columns = a->size - part * SIDE;
            write_rows(dk, 0, count, columns, (number *)place(&a->dk, head, token) + part * SIDE, a->dk.token_stride);
            write_rows(dv, 0, count, columns, (number *)place(&a->dv, head, token) + part * SIDE, a->dv.token_stride);
        }
}

/* The largest of all segments: strips of rows, of keys, and of rows by keys. */
typedef struct {
    int64_t rows, keys, d_scores;
} extent;

static extent extent_of(const attention *a) {
    extent e = {1, 1, 1};
    for (int64_t i = 0; i < a->families[a->num_families]; i++) {
        e.rows = larger(e.rows, STEPS(a->segments[i].length));
        e.keys = larger(e.keys, key_strips(a->segments + i));
        e.d_scores = larger(e.d_scores, strips_before(a->segments + i, STEPS(a->segments[i].length)));
    }
    return e;
}

/* Cut a thread's memory into its parts; from no memory on, the end is what all take. */
static char *furnish(room *r, const attention *a, extent e, char *at) {
    int64_t wide = STEPS(a->size);
#define PART(name, entries) r->name = (void *)at, at += (entries) * sizeof *r->name
    PART(rows, wide * STEP);
    PART(keys, e.keys * wide * STEP);
    PART(values, e.keys * wide * STEP);
    PART(shares, larger(e.keys, e.rows) * STEP);
    PART(blocks, larger(e.keys, 2) * STEP);
    if (a->d_out.at) {
        PART(key_rows, e.keys * wide * STEP);
        PART(value_rows, e.keys * wide * STEP);
        PART(q_columns, e.rows * wide * STEP);
        PART(q_steps, e.rows * wide * STEP);
        PART(d_columns, e.rows * wide * STEP);
        PART(d_steps, e.rows * wide * STEP);
        PART(d_scores, e.rows * STEP);
        PART(d_score_rows, e.d_scores * STEP);
        PART(dk, e.rows * wide * STEP);
        PART(dv, e.rows * wide * STEP);
        PART(prefix_dk, e.keys * wide * STEP);
        PART(prefix_dv, e.keys * wide * STEP);
        PART(deltas, e.rows * SIDE);
        PART(row_sums, e.rows * SIDE);
    }
#undef PART
    return at;
}

/* Bytes that `attend` wants for each thread. */
int64_t attention_bytes(const attention *a) {
    room r;
    return furnish(&r, a, extent_of(a), 0) - (char *)0;
}

/* Set out and sums; or, where d_out is given, dq, dk and dv. */
void attend(const attention *a, char *scratch, int threads) {
    extent e = extent_of(a);
    int64_t room_bytes = attention_bytes(a), num_tasks = a->num_families * a->num_heads, is_back = a->d_out.at != 0;
#pragma omp parallel num_threads(threads)
    {
        room r;
        furnish(&r, a, e, scratch + omp_get_thread_num() * room_bytes);
        claim_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_tasks; task++) {
            int64_t family = task / a->num_heads, head = task % a->num_heads;
            const segment *begin = a->segments + a->families[family], *end = a->segments + a->families[family + 1];
            int64_t prefix_length = begin->prefix_length, prefix_entries = STEPS(prefix_length) * STEPS(a->size) * STEP;
            if (is_back && prefix_length) {
                memset(r.prefix_dk, 0, prefix_entries * sizeof(float));
                memset(r.prefix_dv, 0, prefix_entries * sizeof(float));
            }
            for (const segment *s = begin; s < end; s++) {
                int is_prefix = prefix_length && !s->prefix_length;
                if (!is_back) {
                    attend_segment(a, s, head, &r);
                    continue;
                }
                attend_segment_back(a, s, head, is_prefix, &r);
                if (!is_prefix) write_gradients(a, head, s->start, s->length, r.dk, r.dv);
            }
            if (is_back && prefix_length)
                write_gradients(a, head, begin->prefix_start, prefix_length, r.prefix_dk, r.prefix_dv);
        }
        _tile_release();
    }
}
#endif

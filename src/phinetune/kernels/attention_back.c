/* Attention's way back: probabilities are formed again, keys by rows, from scores and the logarithms of sums.
   FlashAttention-2 (arXiv 2307.08691), algorithm 2; the gradients of scores are kept, so that none is formed twice. */

#include "number.h"

#ifdef HAS_TILES

#include "attention.h"

/* Rows of a block by columns: 32 rows of 32 entries to their transpose. */
static void transpose(const number *from, number *to) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    __m512i low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = _mm512_load_si512(from + i * SIDE);
        high[i] = _mm512_load_si512(from + (i + 16) * SIDE);
    }
    transpose_pairs(low);
    transpose_pairs(high);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(to + 2 * i * SIDE, _mm512_permutex2var_epi16(low[i], even, high[i]));
        _mm512_store_si512(to + (2 * i + 1) * SIDE, _mm512_permutex2var_epi16(low[i], odd, high[i]));
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
            __m512 slope = _mm512_set1_ps(a->scale), x = _mm512_mul_ps(_mm512_load_ps(scores + 16 * half), slope);
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
    int64_t num_strips = STEPS(s->length), wide = STEPS(a->size), strip = num_strips * STEP;
    for (int64_t i = 0; i < num_strips; i++) {
        int64_t token = s->start + i * SIDE, count = smaller(SIDE, s->length - i * SIDE);
        const number *q = place(&a->q, query, token), *d = place(&a->d_out, query, token);
        const number *out = place(&a->out, query, token);
        lay_heads(q, a->q.token_stride, count, a->size, 0, r->q_columns + i * wide * STEP, r->q_steps + i * STEP,
                  strip);
        lay_heads(d, a->d_out.token_stride, count, a->size, 0, r->d_columns + i * wide * STEP, r->d_steps + i * STEP,
                  strip);
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
static void add_gradient(const number *left, const number *right, int64_t strip, int64_t begin, int64_t end,
                         int64_t wide, float *sums) {
    for (int64_t part = 0; part < wide; part++) {
        load_sums(sums + part * STEP);
        add_products(left + begin * STEP, right + part * strip + begin * STEP, end - begin);
        store_sums(sums + part * STEP);
    }
}

void attend_segment_back(const attention *a, const segment *s, int64_t head, int is_prefix, room *r) {
    int64_t num_keys = key_strips(s), num_rows = STEPS(s->length), wide = STEPS(a->size), ahead = prefix_strips(s);
    float *own_dk = is_prefix ? r->prefix_dk : r->dk, *own_dv = is_prefix ? r->prefix_dv : r->dv;
    if (!is_prefix) {
        memset(r->dk, 0, num_rows * wide * STEP * sizeof(float));
        memset(r->dv, 0, num_rows * wide * STEP * sizeof(float));
    }
    for (int64_t j = 0; j < num_keys; j++) {
        stretch keys = keys_of(s, j);
        const number *k = place(&a->k, head, keys.token), *v = place(&a->v, head, keys.token);
        lay_heads(k, a->k.token_stride, keys.count, a->size, r->key_rows + j * wide * STEP, 0, r->keys + j * STEP,
                  num_keys * STEP);
        lay_heads(v, a->v.token_stride, keys.count, a->size, r->value_rows + j * wide * STEP, 0, 0, 0);
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
#endif

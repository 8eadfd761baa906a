/* Attention's way there: scores, probabilities and what each row reads. All scores of 32 rows fit into the cache, so
   that FlashAttention's blocks of keys are not needed. */

#include "number.h"

#ifdef HAS_TILES

#include "attention.h"

/* Scores of a strip of rows, one block for each strip of keys, become a left factor's strip of exponentials; what each
   row of these has to be multiplied by to be probabilities, and the logarithm of its sum. */
static void softmax_rows(const attention *a, const segment *s, int64_t row_strip, int64_t first, int64_t end,
                         float *blocks, number *shares, float *factors, float *sums) {
    for (int64_t row = 0; row < SIDE; row++) {
        int64_t position = s->prefix_length + row_strip * SIDE + row;
        __m512 most = _mm512_set1_ps(-3e38f), sum = _mm512_setzero_ps();
        for (int64_t strip = first; strip < end; strip++) {
            stretch keys = keys_of(s, strip);
            int64_t begin = a->window ? position - a->window + 1 - keys.position : 0;
            uint32_t seen = bits_between(begin, smaller(keys.count, position + 1 - keys.position));
            float *score = blocks + (strip - first) * STEP + row * SIDE;
            for (int half = 0; half < 2; half++, score += 16, seen >>= 16) {
                __m512 x = _mm512_mul_ps(_mm512_load_ps(score), _mm512_set1_ps(a->scale));
                if (a->softcap != 0) x = capped(x, a->softcap);
                x = _mm512_mask_mul_ps(_mm512_set1_ps(-3e38f), seen, x, _mm512_set1_ps(LOG2_E));
                most = _mm512_max_ps(most, x);
                _mm512_store_ps(score, x);
            }
        }
        float greatest = _mm512_reduce_max_ps(most);
        for (int64_t strip = first; strip < end; strip++) {
            const float *score = blocks + (strip - first) * STEP + row * SIDE;
            number *share = shares + (strip - first) * STEP + row * SIDE;
            __m512 low = power_of_two(_mm512_sub_ps(_mm512_load_ps(score), _mm512_set1_ps(greatest)));
            __m512 high = power_of_two(_mm512_sub_ps(_mm512_load_ps(score + 16), _mm512_set1_ps(greatest)));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            _mm512_store_si512(share, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        float total = _mm512_reduce_add_ps(sum);
        factors[row] = 1 / total;
        sums[row] = greatest + log2f(total);
    }
}

void attend_segment(const attention *a, const segment *s, int64_t head, room *r) {
    int64_t strip = key_strips(s) * STEP, wide = STEPS(a->size);
    for (int64_t j = 0; j < key_strips(s); j++) {
        stretch keys = keys_of(s, j);
        const number *k = place(&a->k, head, keys.token), *v = place(&a->v, head, keys.token);
        lay_heads(k, a->k.token_stride, keys.count, a->size, 0, r->keys + j * wide * STEP, 0, 0);
        lay_heads(v, a->v.token_stride, keys.count, a->size, 0, 0, r->values + j * STEP, strip);
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
#endif

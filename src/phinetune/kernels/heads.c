/* Heads of attention: turned by their positions, gathered into tiles, and their scores made probabilities.

   A tile is some rows of the batch; tile s begins at token starts[s] and has sizes[s] of them. Tiles of one
   shape lie one after the other, (tile, head, row, entry), filled up with zeros to num_rows. */

#include <stdlib.h>

#include "number.h"

/* One head's first `turned` entries, each with one of the other half: the first half times cosine less the other times
   `of_second`, the second times cosine and the other times `of_first`. sign -1 turns the other way. */
static inline void turn(const number *from, number *to, const number *cosine, const number *of_second,
                        const number *of_first, float sign, int64_t size, int64_t turned) {
    int64_t half = turned / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = load(from[i]), second = load(from[i + half]);
        to[i] = store(first * load(cosine[i]) - sign * second * load(of_second[i]));
        to[i + half] = store(second * load(cosine[i + half]) + sign * first * load(of_first[i]));
    }
    memcpy(to + turned, from + turned, (size - turned) * sizeof(number));
}

/* (token, head, entry) to (head, token, entry), turned; tokens of x lie token_stride entries apart. */
void rotate(const number *x, int64_t token_stride, const number *cosine, const number *sine, number *out,
            int64_t num_heads, int64_t num_tokens, int64_t size, int64_t turned, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < num_tokens; token++) {
        const number *c = cosine + token * turned, *s = sine + token * turned;
        for (int64_t head = 0; head < num_heads; head++)
            turn(x + token * token_stride + head * size, out + (head * num_tokens + token) * size, c, s,
                 s + turned / 2, 1, size, turned);
    }
}

void rotate_back(const number *d_out, const number *cosine, const number *sine, number *dx, int64_t token_stride,
                 int64_t num_heads, int64_t num_tokens, int64_t size, int64_t turned, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < num_tokens; token++) {
        const number *c = cosine + token * turned, *s = sine + token * turned;
        for (int64_t head = 0; head < num_heads; head++)
            turn(d_out + (head * num_tokens + token) * size, dx + token * token_stride + head * size, c,
                 s + turned / 2, s, -1, size, turned);
    }
}

static void copy_scaled(number *to, const number *from, int64_t size, float scale) {
    if (scale == 1)
        memcpy(to, from, size * sizeof(number));
    else
        for (int64_t i = 0; i < size; i++) to[i] = store(load(from[i]) * scale);
}

/* Rows of the batch, scaled, into tiles. Heads of x lie head_stride entries apart, tokens token_stride;
   heads of a tile lie tile_stride apart, so that a tile may hold more than what is gathered here. */
void gather(const number *x, int64_t head_stride, int64_t token_stride, const int64_t *starts,
            const int64_t *sizes, number *out, int64_t tile_stride, int64_t num_tiles, int64_t num_heads,
            int64_t num_rows, int64_t size, float scale, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t head = 0; head < num_heads; head++) {
            const number *in = x + head * head_stride + starts[tile] * token_stride;
            number *to = out + (tile * num_heads + head) * tile_stride;
            if (token_stride == size)
                copy_scaled(to, in, sizes[tile] * size, scale);
            else
                for (int64_t row = 0; row < sizes[tile]; row++)
                    copy_scaled(to + row * size, in + row * token_stride, size, scale);
            memset(to + sizes[tile] * size, 0, (num_rows - sizes[tile]) * size * sizeof(number));
        }
}

/* The other way, heads apart by tile_stride in x and by head_stride in out; tiles for which `adds` is set
   add to what is there. Tiles of one head follow each other, for their rows may be the same. */
void scatter(const number *x, int64_t tile_stride, const int64_t *starts, const int64_t *sizes,
             const int64_t *adds, number *out, int64_t head_stride, int64_t token_stride, int64_t num_tiles,
             int64_t num_heads, int64_t size, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t head = 0; head < num_heads; head++)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const number *in = x + (tile * num_heads + head) * tile_stride;
            number *to = out + head * head_stride + starts[tile] * token_stride;
            for (int64_t row = 0; row < sizes[tile]; row++, in += size, to += token_stride)
                if (adds[tile])
                    for (int64_t i = 0; i < size; i++) to[i] = store(load(to[i]) + load(in[i]) * scale);
                else
                    copy_scaled(to, in, size, scale);
        }
}

/* Keys are worked on so many at a time, which the compiler knows to be whole vectors. Stretches of keys begin
   at a multiple of it, or see only a part of their first ones. */
#define BLOCK 32

static int32_t first_block(const int32_t *span) { return span[0] / BLOCK * BLOCK; }

/* Zeros before, between and after the blocks of the two stretches. */
static void clear_unseen(number *row, const int32_t *span, int64_t num_keys) {
    int64_t done = 0;
    for (int part = 0; part < 4; part += 2) {
        if (span[part] == span[part + 1]) continue;
        int64_t start = first_block(span + part);
        memset(row + done, 0, (start - done) * sizeof(number));
        done = (span[part + 1] + BLOCK - 1) / BLOCK * BLOCK;
    }
    memset(row + done, 0, (num_keys - done) * sizeof(number));
}

/* Softmax of each row of scores over the keys it sees, the others zero, in place. Scores are (tile, head, row,
   key), num_keys a multiple of BLOCK; spans (tile, row, 4) holds the ends of the two stretches of keys seen. */
void softmax(number *scores, const int32_t *spans, int64_t num_tiles, int64_t num_heads, int64_t num_rows,
             int64_t num_keys, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *shares = malloc(num_keys * sizeof(float));
#pragma omp for collapse(2)
        for (int64_t head = 0; head < num_tiles * num_heads; head++)
            for (int64_t row = 0; row < num_rows; row++) {
                number *at = scores + (head * num_rows + row) * num_keys;
                const int32_t *span = spans + (head / num_heads * num_rows + row) * 4;
                float greatest[BLOCK], sums[BLOCK], most = -INFINITY, sum = 0;
                for (int i = 0; i < BLOCK; i++) greatest[i] = -INFINITY, sums[i] = 0;
                for (int part = 0; part < 4; part += 2)
                    for (int32_t start = first_block(span + part); start < span[part + 1]; start += BLOCK)
                        for (int32_t i = 0; i < BLOCK; i++) {
                            int is_seen = (start + i >= span[part]) & (start + i < span[part + 1]);
                            float score = is_seen ? load(at[start + i]) : -INFINITY;
                            shares[start + i] = score;
                            greatest[i] = score > greatest[i] ? score : greatest[i];
                        }
                for (int i = 0; i < BLOCK; i++) most = greatest[i] > most ? greatest[i] : most;
                for (int part = 0; part < 4; part += 2)
                    for (int32_t start = first_block(span + part); start < span[part + 1]; start += BLOCK)
                        for (int32_t i = 0; i < BLOCK; i++) {
                            shares[start + i] = exponential(shares[start + i] - most);
                            sums[i] += shares[start + i];
                        }
                for (int i = 0; i < BLOCK; i++) sum += sums[i];
                float factor = 1 / sum;
                for (int part = 0; part < 4; part += 2)
                    for (int32_t start = first_block(span + part); start < span[part + 1]; start += BLOCK)
                        for (int32_t i = 0; i < BLOCK; i++) at[start + i] = store(shares[start + i] * factor);
                clear_unseen(at, span, num_keys);
            }
        free(shares);
    }
}

/* The gradient of the scores by that of the probabilities, in its place. Unseen keys have a probability of 0. */
void softmax_back(number *gradient, const number *probabilities, const int32_t *spans, int64_t num_tiles,
                  int64_t num_heads, int64_t num_rows, int64_t num_keys, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t head = 0; head < num_tiles * num_heads; head++)
        for (int64_t row = 0; row < num_rows; row++) {
            number *d = gradient + (head * num_rows + row) * num_keys;
            const number *p = probabilities + (head * num_rows + row) * num_keys;
            const int32_t *span = spans + (head / num_heads * num_rows + row) * 4;
            float sums[BLOCK] = {0}, share = 0;
            for (int part = 0; part < 4; part += 2)
                for (int32_t start = first_block(span + part); start < span[part + 1]; start += BLOCK)
                    for (int32_t i = 0; i < BLOCK; i++) sums[i] += load(d[start + i]) * load(p[start + i]);
            for (int i = 0; i < BLOCK; i++) share += sums[i];
            for (int part = 0; part < 4; part += 2)
                for (int32_t start = first_block(span + part); start < span[part + 1]; start += BLOCK)
                    for (int32_t i = 0; i < BLOCK; i++)
                        d[start + i] = store(load(p[start + i]) * (load(d[start + i]) - share));
            clear_unseen(d, span, num_keys);
        }
}

/* Attention of segments in the tile registers of AMX, and its way back.

   A segment's rows see its own keys up to their own position, and those of a prefix before them. One thread computes
   one key head of a family: a prefix and all segments that continue it, or a segment that continues nothing.
   Nothing but out and the logarithms of the rows' sums is kept for the way back. */

#include "number.h"

#ifdef HAS_TILES

#include <omp.h>

#include "attention.h"

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

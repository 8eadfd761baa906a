/* Products of matrices of bfloat16 in the tile registers of AMX, with an adapter's update in the same sums.

   The right factor is laid out once for all rows, some megabytes of it at a time; of the left one every thread lays
   out so many rows as its cache holds. Sums are float32 and run from the first entry to the last whatever
   else is computed: a row's result does not hang on the rows beside it, nor on the threads. */

#define _GNU_SOURCE
#include "number.h"

#ifdef HAS_TILES

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

#define RIGHT_BYTES (4 << 20)   /* of the right factor at a time, for all threads */
#define LEFT_BYTES (1000 << 10) /* of the left one, for each thread: half of its cache of the second level */
#define PARTIAL_BYTES (8 << 20) /* of sums that go on later */
#define LONGEST 2560            /* entries of a sum in one go */
#define DEEP 8                  /* steps of a strip that stay in the first level's cache: 16 KB */
#define PAST_CACHE (1 << 20)    /* entries: so large a result is not fetched into the cache before it is written */
#define GROUP 32                /* strips of an upright factor laid out row by row */

/* out = scale * (left right + kept(update_left update_right)) + bias.

   left is (num_rows, depth) and right (depth, num_columns), or its transpose where it is not upright; the same holds
   for update_left (num_rows, rank) and update_right. rank 0: no update. A mask drops entries of left, of an upright
   right, or of the update's product, and has one bit for each entry of that, row by row. */
typedef struct {
    const number *left, *right, *update_left, *update_right, *bias;
    const uint32_t *left_mask, *right_mask, *update_mask;
    void *out;
    int64_t left_stride, right_stride, update_left_stride, update_right_stride, out_stride;
    int64_t right_is_upright, update_right_is_upright, out_is_float;
    int64_t num_rows, num_columns, depth, rank;
    float scale;
} product;

/* How the work is cut; sizes in strips unless told. */
typedef struct {
    int64_t rows, columns;    /* of the whole product */
    int64_t columns_at_once, rows_at_once;
    int64_t longest;          /* entries of a sum in one go */
    int64_t strip;            /* entries of a strip of either factor */
    int64_t row_tasks, column_tasks;
    int64_t rights, partials; /* bytes of scratch that threads share; then what each has of its own */
    int64_t lefts, blocks;
} cut;

static inline int64_t ratio(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

static cut cut_of(const product *p, int threads) {
    cut c = {.rows = STEPS(p->num_rows), .columns = STEPS(p->num_columns), .longest = p->depth};
    if (c.longest > LONGEST) c.longest = STEPS(ratio(p->depth, ratio(p->depth, LONGEST))) * SIDE;
    c.strip = (STEPS(c.longest) + STEPS(p->rank)) * STEP;
    c.columns_at_once = smaller(c.columns, RIGHT_BYTES / (c.strip * sizeof(number)));
    if (p->depth > c.longest)
        c.columns_at_once = smaller(c.columns_at_once, PARTIAL_BYTES / (c.rows * STEP * sizeof(float)));
    c.columns_at_once = larger(c.columns_at_once, 1);
    /* As many rows together as can be: that often a laid out column is used. Threads share the columns of these. */
    c.row_tasks = ratio(c.rows, larger(1, LEFT_BYTES / (c.strip * sizeof(number))));
    c.rows_at_once = ratio(c.rows, c.row_tasks);
    c.row_tasks = ratio(c.rows, c.rows_at_once);
    c.column_tasks = smaller(c.columns_at_once, threads / common_divisor(c.row_tasks, threads));
    c.rights = c.columns_at_once * c.strip * sizeof(number);
    c.partials = p->depth > c.longest ? c.columns_at_once * c.rows * STEP * sizeof(float) : 0;
    c.lefts = c.rows_at_once * c.strip * sizeof(number);
    c.blocks = c.rows_at_once * STEP * sizeof(float);
    return c;
}

/* Bytes that `multiply` wants for its own use. */
int64_t scratch_bytes(const product *p, int threads) {
    cut c = cut_of(p, threads);
    return c.rights + c.partials + threads * (c.lefts + c.blocks);
}

/* Whether the operating system lends this process the tile registers (Linux from 5.16 on). */
int64_t can_multiply(void) {
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

/* Some strips of a right factor, rows `first` to first + depth of it. Strips of `to` lie strip_entries apart. */
static void lay_right(const number *from, int64_t stride, int64_t is_upright, int64_t num_columns, int64_t first,
                      int64_t depth, int64_t begin, int64_t end, const uint32_t *mask, number *to,
                      int64_t strip_entries) {
    for (int64_t at = 0; at < depth; at += SIDE) {
        int64_t row = first + at, rows = depth - at, column = begin * SIDE;
        if (is_upright) {
            lay_columns(from + row * stride + column, stride, rows, smaller(end * SIDE, num_columns) - column, mask,
                        row * num_columns + column, num_columns, to + at * SIDE, strip_entries);
            continue;
        }
        for (int64_t i = begin; i < end; i++)
            lay_rows_as_columns(from + i * SIDE * stride + row, stride, rows, num_columns - i * SIDE,
                                to + (i - begin) * strip_entries + at * SIDE);
    }
}

static void lay_left(const product *p, int64_t first, int64_t depth, int64_t rank, int64_t begin, int64_t end,
                     number *to, int64_t strip_entries) {
    for (int64_t i = begin; i < end; i++, to += strip_entries) {
        int64_t row = i * SIDE, rows = p->num_rows - row;
        lay_rows(p->left + row * p->left_stride + first, p->left_stride, rows, depth, p->left_mask,
                 row * p->depth + first, p->depth, to);
        if (rank)
            lay_rows(p->update_left + row * p->update_left_stride, p->update_left_stride, rows, rank, 0, 0, 0,
                     to + STEPS(depth) * STEP);
    }
}

/* Drop entries of a block whose first one is entry `at` of the mask. */
static void drop_sums(float *block, const uint32_t *mask, int64_t at, int64_t stride, int64_t num_rows) {
    for (int64_t row = 0; row < smaller(num_rows, SIDE); row++, at += stride) {
        uint32_t kept = kept_bits(mask, at);
        for (int half = 0; half < 2; half++, kept >>= 16) {
            float *sums = block + row * SIDE + 16 * half;
            _mm512_store_ps(sums, _mm512_maskz_load_ps(kept, sums));
        }
    }
}

static inline __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static void write_block(const product *p, const float *block, int64_t row, int64_t column) {
    uint32_t kept = first_bits(p->num_columns - column);
    int is_past_cache = p->num_rows * p->num_columns > PAST_CACHE;
    __m512 scale = _mm512_set1_ps(p->scale), bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (p->bias)
        for (int half = 0; half < 2; half++)
            bias[half] = widened(_mm256_maskz_loadu_epi16(kept >> 16 * half, p->bias + column + 16 * half));
    for (int64_t i = 0, end = smaller(SIDE, p->num_rows - row); i < end; i++, block += SIDE) {
        int64_t at = (row + i) * p->out_stride + column;
        __m512 low = _mm512_fmadd_ps(_mm512_load_ps(block), scale, bias[0]);
        __m512 high = _mm512_fmadd_ps(_mm512_load_ps(block + 16), scale, bias[1]);
        if (p->out_is_float) {
            _mm512_mask_storeu_ps((float *)p->out + at, kept, low);
            _mm512_mask_storeu_ps((float *)p->out + at + 16, kept >> 16, high);
            continue;
        }
        number *to = (number *)p->out + at;
        __m512i line = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (is_past_cache && kept == 0xffffffff && (uintptr_t)to % 64 == 0)
            _mm512_stream_si512((void *)to, line);
        else
            _mm512_mask_storeu_epi16(to, kept, line);
    }
}

/* Strips `begin` to `end` of rows times one strip of columns: `size` entries of the sums from `first` on. A part of the
   columns stays in the first level's cache while all the rows pass by, sums wait in `blocks`. */
static void multiply_strip(const product *p, const cut *c, const number *lefts, const number *right, float *blocks,
                           float *partials, int64_t begin, int64_t end, int64_t column_strip, int64_t first,
                           int64_t size, int64_t rank) {
    int64_t num_steps = STEPS(size), column = column_strip * SIDE, lines = DEEP * STEP * sizeof(number) / 64;
    for (int64_t step = 0; step < num_steps; step += DEEP)
        for (int64_t i = begin; i < end; i++) {
            const number *left = lefts + (i - begin) * c->strip;
            float *block = blocks + (i - begin) * STEP, *partial = partials + i * STEP;
            if (step || first)
                load_sums(step ? block : partial);
            else
                zero_sums();
            if (rank && !step) {
                add_products(left + num_steps * STEP, right + num_steps * STEP, STEPS(rank));
                if (p->update_mask) {
                    store_sums(block);
                    drop_sums(block, p->update_mask, i * SIDE * p->num_columns + column, p->num_columns,
                              p->num_rows - i * SIDE);
                    load_sums(block);
                }
            }
            /* Meanwhile what comes next of the columns is fetched: without, a third of the time is waiting. */
            const char *next = (const char *)(right + (step + DEEP) * STEP);
            int64_t num_rows = end - begin, line = (i - begin) * lines / num_rows;
            for (; line < (i + 1 - begin) * lines / num_rows; line++) __builtin_prefetch(next + line * 64, 0, 2);
            add_products(left + step * STEP, right + step * STEP, smaller(DEEP, num_steps - step));
            int is_last = step + DEEP >= num_steps;
            store_sums(is_last && first + size < p->depth ? partial : block);
            if (is_last && first + size == p->depth) write_block(p, block, i * SIDE, column);
        }
}

void multiply(const product *p, char *scratch, int threads) {
    cut c = cut_of(p, threads);
    number *rights = (number *)scratch;
    float *partials = (float *)(scratch + c.rights);
#pragma omp parallel num_threads(threads)
    {
        claim_tiles();
        for (int64_t column_strip = 0; column_strip < c.columns; column_strip += c.columns_at_once)
            for (int64_t first = 0; first < p->depth; first += c.longest) {
                int64_t num_strips = smaller(c.columns_at_once, c.columns - column_strip);
                int64_t size = smaller(c.longest, p->depth - first), rank = first ? 0 : p->rank;
                int64_t group = smaller(GROUP, ratio(num_strips, threads));
#pragma omp for schedule(static)
                for (int64_t i = 0; i < num_strips; i += group) {
                    int64_t begin = column_strip + i, end = column_strip + smaller(i + group, num_strips);
                    number *to = rights + i * c.strip;
                    lay_right(p->right, p->right_stride, p->right_is_upright, p->num_columns, first, size, begin, end,
                              p->right_mask, to, c.strip);
                    if (rank)
                        lay_right(p->update_right, p->update_right_stride, p->update_right_is_upright, p->num_columns,
                                  0, rank, begin, end, 0, to + STEPS(size) * STEP, c.strip);
                }
#pragma omp for collapse(2) schedule(static)
                for (int64_t row_task = 0; row_task < c.row_tasks; row_task++)
                    for (int64_t column_task = 0; column_task < c.column_tasks; column_task++) {
                        char *own = scratch + c.rights + c.partials + omp_get_thread_num() * (c.lefts + c.blocks);
                        int64_t begin = row_task * c.rows_at_once, end = smaller(begin + c.rows_at_once, c.rows);
                        lay_left(p, first, size, rank, begin, end, (number *)own, c.strip);
                        for (int64_t i = column_task * num_strips / c.column_tasks;
                             i < (column_task + 1) * num_strips / c.column_tasks; i++)
                            multiply_strip(p, &c, (const number *)own, rights + i * c.strip,
                                           (float *)(own + c.lefts), partials + i * c.rows * STEP, begin, end,
                                           column_strip + i, first, size, rank);
                    }
            }
        _tile_release();
        _mm_sfence(); /* what was written past the cache is there for all threads */
    }
}
#else
int64_t can_multiply(void) { return 0; }
#endif

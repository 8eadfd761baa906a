/* Norm and gated activation of a decoder block: a row is read once and stays in the cache. */

#include "number.h"

/* RMS norm of x, or of x + branch, which is then written to sum. Rounded to the type of the entries before
   the weight, as transformers does. inverse holds 1 / root mean square of each row. */
void norm(const number *x, const number *branch, const number *weight, number *sum, number *out, float *inverse,
          int64_t num_rows, int64_t width, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) {
        const number *in = x + row * width;
        if (branch) {
            const number *other = branch + row * width;
            number *both = sum + row * width;
            for (int64_t i = 0; i < width; i++) both[i] = store(load(in[i]) + load(other[i]));
            in = both;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += load(in[i]) * load(in[i]);
        float factor = 1 / sqrtf(squares / width + epsilon);
        number *to = out + row * width;
        for (int64_t i = 0; i < width; i++) to[i] = store(load(weight[i]) * load(store(load(in[i]) * factor)));
        inverse[row] = factor;
    }
}

/* The gradient of x by its norm, and by the path past it where d_past is given. */
void norm_back(const number *x, const number *weight, const float *inverse, const number *d_out,
               const number *d_past, number *dx, int64_t num_rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) {
        const number *in = x + row * width, *d = d_out + row * width;
        float factor = inverse[row], share = 0;
#pragma omp simd reduction(+ : share)
        for (int64_t i = 0; i < width; i++) share += load(d[i]) * load(weight[i]) * load(in[i]);
        share *= factor * factor / width;
        const number *past = d_past ? d_past + row * width : 0;
        number *to = dx + row * width;
        if (past)
            for (int64_t i = 0; i < width; i++)
                to[i] = store((load(d[i]) * load(weight[i]) - load(in[i]) * share) * factor + load(past[i]));
        else
            for (int64_t i = 0; i < width; i++)
                to[i] = store((load(d[i]) * load(weight[i]) - load(in[i]) * share) * factor);
    }
}

/* silu(gate) * up. Rows of gate and up lie `stride` entries apart. */
void gate(const number *gate, const number *up, number *out, int64_t num_rows, int64_t width, int64_t stride,
          int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) {
        const number *g = gate + row * stride, *u = up + row * stride;
        number *to = out + row * width;
        for (int64_t i = 0; i < width; i++) {
            float x = load(g[i]);
            to[i] = store(x / (1 + exponential(-x)) * load(u[i]));
        }
    }
}

void gate_back(const number *gate, const number *up, const number *d_out, number *d_gate, number *d_up,
               int64_t num_rows, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) {
        const number *g = gate + row * stride, *u = up + row * stride, *d = d_out + row * width;
        number *to_gate = d_gate + row * stride, *to_up = d_up + row * stride;
        for (int64_t i = 0; i < width; i++) {
            float x = load(g[i]), out = load(d[i]);
            float sigmoid = 1 / (1 + exponential(-x));
            to_up[i] = store(out * x * sigmoid);
            to_gate[i] = store(out * load(u[i]) * sigmoid * (1 + x * (1 - sigmoid)));
        }
    }
}

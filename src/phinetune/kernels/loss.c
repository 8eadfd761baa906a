/* Cross-entropy of rows of logits, whose gradient takes their place. */

#include <stdlib.h>

#include "number.h"

/* -log softmax of each row at its target, of which a share `smoothing` is spread over all entries. Logits came
   out of softcap * tanh(. / softcap) where softcap is not 0. */
void cross_entropy(number *logits, const int64_t *targets, float *losses, int64_t num_rows, int64_t num_entries,
                   float smoothing, float softcap, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *shares = malloc(num_entries * sizeof(float));
#pragma omp for
        for (int64_t row = 0; row < num_rows; row++) {
            number *at = logits + row * num_entries;
            float greatest = -INFINITY, sum = 0, all = 0;
#pragma omp simd reduction(max : greatest)
            for (int64_t i = 0; i < num_entries; i++) {
                float logit = load(at[i]);
                greatest = logit > greatest ? logit : greatest;
            }
#pragma omp simd reduction(+ : sum, all)
            for (int64_t i = 0; i < num_entries; i++) {
                float above = load(at[i]) - greatest;
                shares[i] = exponential(above);
                sum += shares[i];
                all += above;
            }
            float above = load(at[targets[row]]) - greatest, rest = smoothing / num_entries;
            losses[row] = logf(sum) - (1 - smoothing) * above - rest * all;
            float factor = 1 / sum;
            shares[targets[row]] -= (1 - smoothing) * sum;
            if (softcap)
                for (int64_t i = 0; i < num_entries; i++) {
                    float capped = load(at[i]) / softcap;
                    at[i] = store((shares[i] * factor - rest) * (1 - capped * capped));
                }
            else
                for (int64_t i = 0; i < num_entries; i++) at[i] = store(shares[i] * factor - rest);
        }
        free(shares);
    }
}

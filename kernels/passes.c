/* The inner loops of the CPU path: one pass over the rows of a matrix each, and a norm's vectors.
 *
 * compiled.py builds this file with REAL=float, with REAL=double, and for matrices of bfloat16; passes.py and norm.py
 * call it. The rows of a matrix lie `stride` values apart, the values of a row side by side. Rows are shared out among the
 * threads in one fixed way, and each thread has sums of its own, in double: as many threads, the same bits.
 *
 * Matrices are prefixes of wider buffers, so their rows lie in many pages and end where a hardware prefetcher
 * would go on; asking for a row ahead of time is worth a third of the bandwidth where rows are short. Decisions
 * that are the same for all values stand in the loops; at -O3 compilers make a loop of each case (unswitching).
 */
#include <math.h>

#include "rows.h"

enum { AHEAD = 4 }; /* rows */

/* Harmless beyond the last row: what cannot be read is not fetched. */
static inline void fetch(const Stored *row, int64_t columns) {
    for (int64_t column = 0; column < columns; column += CACHE_LINE / (int64_t)sizeof(Stored))
        __builtin_prefetch(row + column);
}

/* A norm's vectors, computed in double and rounded once: mean, 1 / std, scale, shift [4, columns], with
 * norm(x) = x * scale + shift. gamma is 1 and beta 0 where NULL. */
void fold(const REAL *mean, const REAL *var, const REAL *gamma, const REAL *beta, double eps, int64_t columns,
          REAL *norm) {
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
        double inv_std = 1 / sqrt(var[c] + eps);
        REAL scale = (REAL)(inv_std * (gamma ? gamma[c] : 1));
        norm[c] = mean[c];
        norm[columns + c] = (REAL)inv_std;
        norm[2 * columns + c] = scale;
        norm[3 * columns + c] = (REAL)((beta ? beta[c] : 0) - (double)mean[c] * scale);
    }
}

/* The mean of every `step`th row, 0 where that is not finite. */
void pivot(const Stored *x, int64_t x_stride, int64_t rows, int64_t columns, int64_t step, REAL *mean) {
    int64_t count = (rows + step - 1) / step;
    for (int64_t c = 0; c < columns; c++) mean[c] = 0;
    for (int64_t row = 0; row < rows; row += step)
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) mean[c] += loaded(x[row * x_stride + c]) / count;
    for (int64_t c = 0; c < columns; c++) mean[c] = mean[c] - mean[c] == 0 ? mean[c] : 0;
}

/* Mean and biased variance from all threads' sums [2, columns] of x - pivot and of its squares. */
void statistics(const double *sums, int64_t sums_stride, int64_t threads, int64_t rows, int64_t columns,
                const REAL *pivot, REAL *mean, REAL *var) {
    for (int64_t c = 0; c < columns; c++) {
        double value = 0, square = 0;
        for (int64_t thread = 0; thread < threads; thread++) {
            value += sums[thread * sums_stride + c];
            square += sums[thread * sums_stride + columns + c];
        }
        value /= rows;
        double spread = square / rows - value * value;
        mean[c] = (REAL)(pivot[c] + value);
        var[c] = (REAL)(spread < 0 ? 0 : spread);
    }
}

/* dgamma, dbeta, and terms [2, columns], the constant and slope that the statistics' being functions of x takes from
 * the gradient of x; from all threads' sums [2, columns] of dz and of dz * (x - mean). */
void norm_gradients(const double *sums, int64_t sums_stride, int64_t threads, int64_t rows, int64_t columns,
                    const REAL *norm, REAL *gamma, REAL *beta, REAL *terms) {
    for (int64_t c = 0; c < columns; c++) {
        double dz = 0, dz_x = 0, inv_std = norm[columns + c], share = (double)norm[2 * columns + c] / rows;
        for (int64_t thread = 0; thread < threads; thread++) {
            dz += sums[thread * sums_stride + c];
            dz_x += sums[thread * sums_stride + columns + c];
        }
        double grad_gamma = dz_x * inv_std;
        gamma[c] = (REAL)grad_gamma;
        beta[c] = (REAL)dz;
        terms[c] = (REAL)(share * dz);
        terms[columns + c] = (REAL)(share * grad_gamma * inv_std);
    }
}

/* out = relu(norm(x)) */
void relu_norm(const Stored *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *norm, Stored *out,
               int64_t out_stride, int threads) {
    const REAL *scale = norm + 2 * columns, *shift = norm + 3 * columns;
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            const Stored *x_row = x + row * x_stride;
            Stored *out_row = out + row * out_stride;
            fetch(x_row + AHEAD * x_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) out_row[c] = stored(relu(loaded(x_row[c]) * scale[c] + shift[c]));
        }
    }
}

/* A thread's sums [2, columns] += those of x - pivot, and of its squares; x is copied to out, unless that is NULL. */
void column_sums(const Stored *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *pivot, double *sums,
                 int64_t sums_stride, Stored *out, int64_t out_stride, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        double *values = sums + omp_get_thread_num() * sums_stride, *squares = values + columns;
        for (int64_t row = own.first; row < own.last; row++) {
            const Stored *x_row = x + row * x_stride;
            Stored *out_row = out ? out + row * out_stride : NULL;
            fetch(x_row + AHEAD * x_stride, columns);
            if (out) fetch(out_row + AHEAD * out_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                if (out) out_row[c] = x_row[c];
                double value = (double)loaded(x_row[c]) - (double)pivot[c];
                values[c] += value;
                squares[c] += value * value;
            }
        }
    }
}

/* A row of it; with what is the same for all rows as constants. */
INLINE void pass_back(const Stored *grad, const Stored *x, int64_t columns, const REAL *norm, double *sum_dz,
                      double *sum_dz_x, Stored *grad_x, int accumulates) {
    const REAL *mean = norm, *scale = norm + 2 * columns, *shift = norm + 3 * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
        REAL value = loaded(x[c]), dz = relu_backward(loaded(grad[c]), value * scale[c] + shift[c]);
        sum_dz[c] += dz;
        sum_dz_x[c] += (double)dz * (value - mean[c]);
        if (grad_x) grad_x[c] = stored((accumulates ? loaded(grad_x[c]) : 0) + scale[c] * dz);
    }
}

/* With dz = grad where norm(x) > 0, else 0:
 * a thread's sums [2, columns] += those of dz and of dz * (x - mean);
 * grad_x = scale * dz, or, if `accumulates`, grad_x += scale * dz; nothing is written if grad_x is NULL. */
void relu_norm_backward(const Stored *grad, int64_t grad_stride, const Stored *x, int64_t x_stride, int64_t rows,
                        int64_t columns, const REAL *norm, double *sums, int64_t sums_stride, Stored *grad_x,
                        int64_t grad_x_stride, int accumulates, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        double *sum_dz = sums + omp_get_thread_num() * sums_stride, *sum_dz_x = sum_dz + columns;
        for (int64_t row = own.first; row < own.last; row++) {
            const Stored *grad_row = grad + row * grad_stride, *x_row = x + row * x_stride;
            Stored *grad_x_row = grad_x ? grad_x + row * grad_x_stride : NULL;
            fetch(x_row + AHEAD * x_stride, columns);
            if (grad_x) fetch(grad_x_row + AHEAD * grad_x_stride, columns);
            if (!grad_x)
                pass_back(grad_row, x_row, columns, norm, sum_dz, sum_dz_x, NULL, 0);
            else if (accumulates)
                pass_back(grad_row, x_row, columns, norm, sum_dz, sum_dz_x, grad_x_row, 1);
            else
                pass_back(grad_row, x_row, columns, norm, sum_dz, sum_dz_x, grad_x_row, 0);
        }
    }
}

/* grad = scale * dz - constant - (x - mean) * slope, in place; terms [2, columns] are constant and slope, none
 * where NULL. */
void relu_norm_backward_in_place(Stored *grad, int64_t grad_stride, const Stored *x, int64_t x_stride, int64_t rows,
                                 int64_t columns, const REAL *norm, const REAL *terms, int threads) {
    const REAL *mean = norm, *scale = norm + 2 * columns, *shift = norm + 3 * columns;
    const REAL *constant = terms, *slope = terms ? terms + columns : NULL;
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            Stored *grad_row = grad + row * grad_stride;
            const Stored *x_row = x + row * x_stride;
            fetch(x_row + AHEAD * x_stride, columns);
            fetch(grad_row + AHEAD * grad_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                REAL x_here = loaded(x_row[c]);
                REAL value = scale[c] * relu_backward(loaded(grad_row[c]), x_here * scale[c] + shift[c]);
                if (terms) value -= constant[c] + (x_here - mean[c]) * slope[c];
                grad_row[c] = stored(value);
            }
        }
    }
}

/* out = grad - constant - (x - mean) * slope; out may be grad itself */
void settle(const Stored *grad, int64_t grad_stride, const Stored *x, int64_t x_stride, int64_t rows, int64_t columns,
            const REAL *mean, const REAL *terms, Stored *out, int64_t out_stride, int threads) {
    const REAL *constant = terms, *slope = terms + columns;
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            const Stored *grad_row = grad + row * grad_stride, *x_row = x + row * x_stride;
            Stored *out_row = out + row * out_stride;
            fetch(x_row + AHEAD * x_stride, columns);
            fetch(grad_row + AHEAD * grad_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++)
                out_row[c] = stored(loaded(grad_row[c]) - constant[c] - (loaded(x_row[c]) - mean[c]) * slope[c]);
        }
    }
}

/* The inner loops of the CPU path: one pass over the rows of a matrix each.
 *
 * compiled.py builds this file once with REAL=float and once with REAL=double; passes.py calls it. The rows of a
 * matrix lie `stride` values apart, the values of a row side by side. Rows are shared out among the threads in one
 * fixed way, and each thread has sums of its own, in double: as many threads, the same bits.
 *
 * Matrices are prefixes of wider buffers, so their rows lie in many pages and end where a hardware prefetcher
 * would go on; asking for a row ahead of time is worth a third of the bandwidth where rows are short. Decisions
 * that are the same for all values stand in the loops; at -O3 compilers make a loop of each case (unswitching).
 */
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

enum { AHEAD = 4, CACHE_LINE = 64 };

typedef struct {
    int64_t first, last;
} Range;

/* The rows of the thread that asks. */
static Range own_rows(int64_t rows) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Range){rows * thread / threads, rows * (thread + 1) / threads};
}

/* Harmless beyond the last row: what cannot be read is not fetched. */
static inline void fetch(const REAL *row, int64_t columns) {
    for (int64_t column = 0; column < columns; column += CACHE_LINE / (int64_t)sizeof(REAL))
        __builtin_prefetch(row + column);
}

/* NaN passes, as it does in PyTorch. */
static inline REAL relu(REAL z) { return z <= 0 ? 0 : z; }

static inline REAL relu_backward(REAL grad, REAL z) { return z <= 0 ? 0 : grad; }

/* out = relu(x * scale + shift) */
void relu_norm(const REAL *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *scale,
               const REAL *shift, REAL *out, int64_t out_stride, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            const REAL *x_row = x + row * x_stride;
            REAL *out_row = out + row * out_stride;
            fetch(x_row + AHEAD * x_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) out_row[c] = relu(x_row[c] * scale[c] + shift[c]);
        }
    }
}

/* A thread's sums [2, columns] += those of x - pivot, and of its squares; x is copied to out, unless that is NULL. */
void column_sums(const REAL *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *pivot, double *sums,
                 int64_t sums_stride, REAL *out, int64_t out_stride, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        double *values = sums + omp_get_thread_num() * sums_stride, *squares = values + columns;
        for (int64_t row = own.first; row < own.last; row++) {
            const REAL *x_row = x + row * x_stride;
            REAL *out_row = out ? out + row * out_stride : NULL;
            fetch(x_row + AHEAD * x_stride, columns);
            if (out) fetch(out_row + AHEAD * out_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                if (out) out_row[c] = x_row[c];
                double value = (double)x_row[c] - (double)pivot[c];
                values[c] += value;
                squares[c] += value * value;
            }
        }
    }
}

/* With dz = grad where x * scale + shift > 0, else 0:
 * a thread's sums [2, columns] += those of dz and of dz * (x - mean);
 * grad_x = scale * dz, or, if `accumulates`, grad_x += scale * dz; nothing is written if grad_x is NULL. */
void relu_norm_backward(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride, int64_t rows,
                        int64_t columns, const REAL *mean, const REAL *scale, const REAL *shift, double *sums,
                        int64_t sums_stride, REAL *grad_x, int64_t grad_x_stride, int accumulates, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        double *sum_dz = sums + omp_get_thread_num() * sums_stride, *sum_dz_x = sum_dz + columns;
        for (int64_t row = own.first; row < own.last; row++) {
            const REAL *grad_row = grad + row * grad_stride, *x_row = x + row * x_stride;
            REAL *grad_x_row = grad_x ? grad_x + row * grad_x_stride : NULL;
            fetch(x_row + AHEAD * x_stride, columns);
            if (grad_x) fetch(grad_x_row + AHEAD * grad_x_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                REAL dz = relu_backward(grad_row[c], x_row[c] * scale[c] + shift[c]);
                sum_dz[c] += dz;
                sum_dz_x[c] += (double)dz * (x_row[c] - mean[c]);
                if (grad_x) grad_x_row[c] = (accumulates ? grad_x_row[c] : 0) + scale[c] * dz;
            }
        }
    }
}

/* grad = scale * dz - constant - (x - mean) * slope, in place; scale * dz if constant and slope are NULL. */
void relu_norm_backward_in_place(REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride, int64_t rows,
                                 int64_t columns, const REAL *mean, const REAL *scale, const REAL *shift,
                                 const REAL *constant, const REAL *slope, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            REAL *grad_row = grad + row * grad_stride;
            const REAL *x_row = x + row * x_stride;
            fetch(x_row + AHEAD * x_stride, columns);
            fetch(grad_row + AHEAD * grad_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                REAL value = scale[c] * relu_backward(grad_row[c], x_row[c] * scale[c] + shift[c]);
                if (constant) value -= constant[c] + (x_row[c] - mean[c]) * slope[c];
                grad_row[c] = value;
            }
        }
    }
}

/* out = grad - constant - (x - mean) * slope; out may be grad itself */
void settle(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride, int64_t rows, int64_t columns,
            const REAL *mean, const REAL *constant, const REAL *slope, REAL *out, int64_t out_stride,
            int threads) {
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        for (int64_t row = own.first; row < own.last; row++) {
            const REAL *grad_row = grad + row * grad_stride, *x_row = x + row * x_stride;
            REAL *out_row = out + row * out_stride;
            fetch(x_row + AHEAD * x_stride, columns);
            fetch(grad_row + AHEAD * grad_stride, columns);
#pragma omp simd
            for (int64_t c = 0; c < columns; c++)
                out_row[c] = grad_row[c] - constant[c] - (x_row[c] - mean[c]) * slope[c];
        }
    }
}

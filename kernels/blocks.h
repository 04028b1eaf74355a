/* Blocked products: sums in registers, the right operand in panels, and what becomes of a block on its way out.
 *
 * Blocking follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): a block of
 * sums stays in registers; the right operand is packed into panels as wide as a block, which all the rows of a tile
 * are multiplied by, one after the other. Panels are as deep as the product: at DenseNets' 1,000 channels shallower
 * ones gain nothing, and so every block is finished when it leaves the registers.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <string.h>

#include "ahead.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, BLOCK_ROWS = 8 }; /* of 32 registers, 16 for sums */
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, BLOCK_ROWS = 6 }; /* of 16 registers, 12 for sums */
#else
enum { VECTOR_BYTES = 16, BLOCK_ROWS = 4 };
#endif

enum {
    LANES = VECTOR_BYTES / sizeof(REAL),
    VECTORS = 2,
    BLOCK_COLUMNS = VECTORS * LANES,
    PART = VECTOR_BYTES / sizeof(double),
    PARTS = LANES / PART, /* of a vector */
    CHAIN = 128 /* multiply-adds one after the other: rounding grows with their number */
};

/* May be loaded from the address of any REAL. */
typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* What comparing vectors gives: all bits of a lane, or none. */
typedef __typeof__((Vector){0} <= (Vector){0}) Mask;

/* As many values as a block has columns. */
typedef struct {
    Vector at[VECTORS];
} Row;

/* As many of a vector's values as fit one as doubles, and they. */
typedef REAL Part __attribute__((vector_size(VECTOR_BYTES / sizeof(double) * sizeof(REAL)), aligned(sizeof(REAL)),
                                 may_alias));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(double)), may_alias));

/* Sums in registers... */
typedef struct {
    Row rows[BLOCK_ROWS];
} Block;

/* ... and in memory, where a block has fewer rows or columns than there is room for. */
typedef union {
    Block block;
    Row rows[BLOCK_ROWS];
    REAL at[BLOCK_ROWS][BLOCK_COLUMNS];
} Lines;

INLINE int64_t padded(int64_t values, int64_t block) { return blocks(values, block) * block; }

/* As relu_backward: values where z may be positive, or NaN. */
INLINE Vector rectified(Vector values, Vector z) { return (Vector)((Mask)values & ~(Mask)(z <= 0)); }

/* 0 in place of what is not finite. */
INLINE Vector finite(Vector values) { return (Vector)((Mask)values & (Mask)(values - values == 0)); }

/* Whether rows can be written past the caches, which would first fetch the lines that are to be overwritten: whole
 * lines by one block, or a line is written twice. Whoever reads them next has to fetch them, and asks ahead. That is for
 * training, whose maps are kept; inference goes through them in parts that fit the caches. */
INLINE int can_stream(const REAL *out, int64_t stride) {
    int64_t row = BLOCK_COLUMNS * sizeof(REAL), lines = (int64_t)(uintptr_t)out | stride * (int64_t)sizeof(REAL) | row;
    return lines % CACHE_LINE == 0;
}

INLINE void stream(Vector *at, Vector value) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)at, (__m512i)value);
#elif defined(__AVX__)
    _mm256_stream_si256((__m256i *)at, (__m256i)value);
#else
    *at = value;
#endif
}

/* What has been streamed is seen by the other threads from here on. */
INLINE void end_streams(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* A row's sums, counted on in double. */
INLINE void count(double *totals, Row sums) {
    REAL values[BLOCK_COLUMNS];
    memcpy(values, &sums, sizeof values);
#pragma omp simd
    for (int c = 0; c < BLOCK_COLUMNS; c++) totals[c] += values[c];
}

/* From one row of a tile to the next: an odd number of cache lines, or all of them would share a few sets. */
INLINE int64_t tile_stride(int64_t columns) {
    return (blocks(columns, LINE) | 1) * LINE;
}

/* A block's left operand: at[i * row + k] in its row i, for k < depth; and the same again at each of some taps, so
 * many values further on. */
typedef struct {
    const REAL *at;
    int64_t row, depth;
    const int64_t *shifts;
    int64_t taps;
} Left;

static const int64_t HERE[] = {0};

INLINE Left rows_of(const REAL *at, int64_t row, int64_t depth) { return (Left){at, row, depth, HERE, 1}; }

/* The sum over k < depth of at[i * row + k * step] * right[k * stride + j], for as many columns j as `vectors` hold. */
INLINE Block chain(const REAL *at, int64_t row, int64_t step, int64_t depth, const REAL *right, int64_t stride,
                   int vectors) {
    Block sum = {0};
    for (int64_t k = 0; k < depth; k++) {
        const Vector *values = (const Vector *)(right + k * stride);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum.rows[i].at[v] += at[i * row + k * step] * values[v];
    }
    return sum;
}

INLINE void add(Block *total, Block sum) {
    for (int i = 0; i < BLOCK_ROWS; i++)
        for (int v = 0; v < VECTORS; v++) total->rows[i].at[v] += sum.rows[i].at[v];
}

/* A left operand's sums with a panel's values, where k goes on from tap to tap. */
INLINE Block multiply(Left left, const REAL *panel, int vectors, Ahead *ahead) {
    Block total = {0};
    for (int64_t tap = 0; tap < left.taps; tap++, panel += left.depth * BLOCK_COLUMNS)
        for (int64_t k = 0; k < left.depth; k += CHAIN) {
            int64_t depth = least(CHAIN, left.depth - k);
            ask(ahead, depth);
            add(&total, chain(left.at + left.shifts[tap] + k, left.row, 1, depth, panel + k * BLOCK_COLUMNS,
                              BLOCK_COLUMNS, vectors));
        }
    return total;
}

/* For at least so many columns; what is beyond them goes nowhere. */
INLINE Lines multiply_some(Left left, const REAL *panel, int64_t columns, Ahead *ahead) {
    return (Lines){columns <= LANES ? multiply(left, panel, 1, ahead) : multiply(left, panel, VECTORS, ahead)};
}

/* Whether that is all of a block, which then need not go through memory. */
INLINE int is_whole(int64_t rows, int64_t columns) { return rows == BLOCK_ROWS && columns == BLOCK_COLUMNS; }

/* relu(norm(x)) of some columns; `scale` and `shift` are theirs. */
INLINE void normalize(const REAL *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *scale,
                      const REAL *shift, REAL *out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t c = 0; c < columns; c++)
            out[row * out_stride + c] = relu(x[row * x_stride + c] * scale[c] + shift[c]);
}

/* What a block will meet on its way out, asked for into the first cache before it is computed. */
INLINE void ask_for_block(const REAL *at, int64_t stride) {
    for (int64_t i = 0; i < BLOCK_ROWS; i++)
        for (int64_t c = 0; c < BLOCK_COLUMNS; c += LINE)
            __builtin_prefetch(at + i * stride + c, 0, 3);
}

/* Where a block of a product goes, and what is made of it on the way; all from the block's first column on. */
typedef struct {
    REAL *out;
    int64_t stride;
    int streams;
    const REAL *scale, *shift; /* of the next norm; NULL: none */
    const REAL *pivot;         /* NULL: no sums */
    double *values, *squares;  /* a thread's sums of out - pivot and of its squares */
} Finish;

/* The same for the block at a row and column. */
INLINE Finish part_of(Finish all, int64_t row, int64_t column) {
    Finish part = {.out = all.out + row * all.stride + column, .stride = all.stride, .streams = all.streams};
    if (all.scale) part.scale = all.scale + column, part.shift = all.shift + column;
    if (all.pivot)
        part.pivot = all.pivot + column, part.values = all.values + column, part.squares = all.squares + column;
    return part;
}

/* Some values as doubles. */
INLINE Doubles widened(const REAL *at) { return __builtin_convertvector(*(const Part *)at, Doubles); }

/* Some whole rows of a block; all of them, where their number is a constant, on their way out of the registers: a
 * vector's columns at a time, since what those of both meet would not stay in 16 registers.
 * Doubles take three times the instructions, so a block's values are summed up as they are, but about its own first row,
 * and only the sums go on about the pivot, in double. What rounding takes grows with how far a block's rows lie apart;
 * about the pivot, which may be an outlier, it would grow with the distance from there. (In float32 rows 10^19 apart have
 * an infinite variance.) */
INLINE void finish_rows(const Row *product, int64_t rows, Finish to) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        int64_t c = v * LANES;
        Vector scale = {0}, shift = {0}, first = {0}, sum = {0}, squares = {0};
        if (to.scale) scale = *(const Vector *)(to.scale + c), shift = *(const Vector *)(to.shift + c);
#pragma GCC unroll 8
        for (int64_t i = 0; i < rows; i++) {
            Vector y = product[i].at[v], *out = (Vector *)(to.out + i * to.stride + c);
            if (to.scale) y = y * scale + shift, y = rectified(y, y);
            if (to.streams)
                stream(out, y);
            else
                *out = y;
            if (i == 0) first = finite(y);
            Vector apart = y - first;
            sum += apart;
            squares += apart * apart;
        }
        if (!to.pivot) continue;
#pragma GCC unroll 2
        for (int d = 0; d < PARTS; d++) {
            Doubles *values = (Doubles *)(to.values + c + d * PART), *all = (Doubles *)(to.squares + c + d * PART);
            Doubles apart = widened((const REAL *)&first + d * PART) - widened(to.pivot + c + d * PART);
            Doubles own = widened((const REAL *)&sum + d * PART), moved = (double)rows * apart + own;
            *values += moved;
            *all += widened((const REAL *)&squares + d * PART) + apart * (own + moved);
        }
    }
}

/* So many of a block's rows, from one on, and of its columns. */
INLINE void finish(const Lines *product, int64_t row, int64_t rows, int64_t columns, Finish to) {
    if (columns == BLOCK_COLUMNS) {
        finish_rows(product->rows + row, rows, to);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) {
            REAL y = product->at[row + i][c];
            if (to.scale) y = relu(y * to.scale[c] + to.shift[c]);
            to.out[i * to.stride + c] = y;
            if (!to.pivot) continue;
            double apart = (double)y - (double)to.pivot[c];
            to.values[c] += apart;
            to.squares[c] += apart * apart;
        }
}

/* What a channel's values are taken relative to: the mean of some, 0 where that is not finite. */
INLINE void pivot_of(Lines some, int64_t columns, REAL *pivot) {
    for (int64_t c = 0; c < columns; c++) {
        REAL mean = 0;
        for (int i = 0; i < BLOCK_ROWS; i++) mean += some.at[i][c] / BLOCK_ROWS;
        pivot[c] = mean - mean == 0 ? mean : 0;
    }
}

/* What the gradient of a = relu(norm(x)) meets; all from a block's first row and column on. */
typedef struct {
    const REAL *x, *a;
    int64_t x_stride, a_stride;
    const REAL *mean, *scale;
    REAL *grad_x; /* NULL: not needed */
    int64_t grad_x_stride;
    int accumulates, streams; /* one of them at most */
    double *dz, *dz_x; /* a thread's sums of dz and of dz * (x - mean) */
} Backward;

/* Some whole rows of a block of it, a vector's columns at a time as well. */
INLINE void pass_rows(const Row *grad, int64_t rows, Backward to) {
    Row sum_dz = {0}, sum_dz_x = {0};
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        int64_t c = v * LANES;
        Vector mean = *(const Vector *)(to.mean + c), scale = *(const Vector *)(to.scale + c);
#pragma GCC unroll 8
        for (int64_t i = 0; i < rows; i++) {
            Vector x = *(const Vector *)(to.x + i * to.x_stride + c), a = *(const Vector *)(to.a + i * to.a_stride + c);
            Vector dz = rectified(grad[i].at[v], a), passed = scale * dz;
            sum_dz.at[v] += dz;
            sum_dz_x.at[v] += dz * (x - mean);
            if (!to.grad_x) continue;
            Vector *grad_x = (Vector *)(to.grad_x + i * to.grad_x_stride + c);
            if (to.accumulates) passed += *grad_x;
            if (to.streams)
                stream(grad_x, passed);
            else
                *grad_x = passed;
        }
    }
    count(to.dz, sum_dz), count(to.dz_x, sum_dz_x);
}

/* So many of a block's rows, from one on, and of its columns. */
INLINE void pass(const Lines *grad, int64_t row, int64_t rows, int64_t columns, Backward to) {
    if (columns == BLOCK_COLUMNS) {
        pass_rows(grad->rows + row, rows, to);
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
        const REAL *x = to.x + i * to.x_stride, *a = to.a + i * to.a_stride;
        REAL *grad_x = to.grad_x ? to.grad_x + i * to.grad_x_stride : NULL;
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) {
            REAL dz = relu_backward(grad->at[row + i][c], a[c]);
            to.dz[c] += dz;
            to.dz_x[c] += (double)dz * (x[c] - to.mean[c]);
            if (grad_x) grad_x[c] = (to.accumulates ? grad_x[c] : 0) + to.scale[c] * dz;
        }
    }
}

/* grad^T a over some rows, at most CHAIN, for a panel's columns of a, added to that panel of a thread's gradient of the
 * weight: [outputs and what is beyond the last][BLOCK_COLUMNS], so that all of it is read and written in one go. */
static APART void add_weight_gradient(const REAL *g, int64_t g_stride, int64_t rows, int64_t outputs, const REAL *a,
                                      int64_t a_stride, int64_t columns, REAL *panel, Ahead *ahead) {
    for (int64_t n = 0; n < outputs; n += BLOCK_ROWS) {
        ask(ahead, rows);
        Block sum = columns <= LANES ? chain(g + n, 1, g_stride, rows, a, a_stride, 1)
                                     : chain(g + n, 1, g_stride, rows, a, a_stride, VECTORS);
        for (int i = 0; i < BLOCK_ROWS; i++)
            for (int v = 0; v < VECTORS; v++)
                *(Vector *)(panel + (n + i) * BLOCK_COLUMNS + v * LANES) += sum.rows[i].at[v];
    }
}

/* A block of such a panel of every thread's, `apart` from one to the next, added up in the threads' order. */
INLINE void add_up_block(const REAL *block, int64_t apart, int64_t outputs, int64_t columns, REAL *total,
                         int64_t from_output, int64_t from_column) {
    int64_t threads = omp_get_num_threads();
    for (int64_t n = 0; n < outputs; n++, block += BLOCK_COLUMNS, total += from_output)
        for (int64_t thread = 0; thread < threads; thread++)
#pragma omp simd
            for (int64_t c = 0; c < columns; c++) {
                REAL before = thread ? total[c * from_column] : 0;
                total[c * from_column] = before + block[thread * apart + c];
            }
}

#endif

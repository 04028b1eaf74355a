/* The CPU path's products: relu(norm(x)) W^T, and backward through it.
 *
 * compiled.py builds this file once with REAL=float and once with REAL=double; products.py calls it. As in passes.c
 * matrices may be prefixes of wider buffers, rows are shared out among the threads in one fixed way, and every sum
 * has one fixed order: as many threads, the same bits. Unlike there, multiply-adds are contracted.
 *
 * A library's product is handed relu(norm(x)) through memory, and hands back its gradient that way. Here a tile of
 * rows is normalized and multiplied while it lies in the caches, and what becomes of a product - statistics, the next
 * norm, the norm's backward - is done to a block of it on its way out of the registers, while the rows of the next
 * tile are on their way in. Forward a tile is a few blocks of rows, small enough for the first cache up to some 450
 * channels or more, and the weight's panels come from the second; backward the weight's gradient wants many rows.
 */
#include "blocks.h"

/* A tile's rows are whole blocks. Forward they fill half of a first cache of 32 KiB, where a panel needs the rest; but
 * there are never so few that the next ones are asked for too late. */
enum {
    FEWEST_ROWS = (16 + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS,
    FORWARD_BYTES = 16 * 1024,
    BACKWARD_ROWS = 96 / BLOCK_ROWS * BLOCK_ROWS
};

/* Forward */

static int64_t forward_rows(int64_t columns) {
    int64_t fit = FORWARD_BYTES / (int64_t)sizeof(REAL) / tile_stride(columns) / BLOCK_ROWS * BLOCK_ROWS;
    return fit < FEWEST_ROWS ? FEWEST_ROWS : fit;
}

/* weight [outputs, columns] as panels [outputs / BLOCK_COLUMNS][columns][BLOCK_COLUMNS]. What a last panel has beyond
 * its columns goes nowhere; zeros are there because arithmetic on whatever lies in memory may be slow.
 * A cache line of the weight at a time: rows a power of two apart would evict each other's. */
static void pack_transposed(const REAL *weight, int64_t weight_stride, int64_t outputs, int64_t columns,
                            REAL *panels) {
#pragma omp for
    for (int64_t first = 0; first < outputs; first += BLOCK_COLUMNS) {
        REAL *panel = panels + first * columns;
        int64_t width = least(BLOCK_COLUMNS, outputs - first);
        if (width < BLOCK_COLUMNS) memset(panel, 0, columns * BLOCK_COLUMNS * sizeof(REAL));
        for (int64_t start = 0; start < columns; start += LINE)
            for (int64_t j = 0; j < width; j++)
                for (int64_t c = start; c < least(columns, start + LINE); c++)
                    panel[c * BLOCK_COLUMNS + j] = weight[(first + j) * weight_stride + c];
    }
}

/* A block of a product, to where it goes. */
static APART void multiply_and_finish(const Left *left, const REAL *panel, int64_t rows, int64_t columns,
                                      const Finish *to, Ahead *ahead) {
    if (is_whole(rows, columns)) {
        finish_rows(multiply(*left, panel, VECTORS, ahead).rows, BLOCK_ROWS, *to);
        return;
    }
    Lines product = multiply_some(*left, panel, columns, ahead);
    finish(&product, 0, rows, columns, *to);
}

/* Rows far apart, and seldom all at one place of an image: what a channel's values are taken relative to is their
 * products' mean, 0 where that is not finite. Every thread finds the same for itself. */
INLINE void find_pivot(const REAL *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *scale,
                       const REAL *shift, const REAL *panels, int64_t outputs, Finish to, REAL *a, int64_t stride,
                       REAL *pivot) {
    for (int64_t i = 0; i < BLOCK_ROWS; i++) {
        int64_t row = rows * (2 * i + 1) / (2 * BLOCK_ROWS + 1);
        normalize(x + row * x_stride, x_stride, 1, columns, scale, shift, a + i * stride, stride);
    }
    for (int64_t n = 0; n < outputs; n += BLOCK_COLUMNS) {
        int64_t width = least(BLOCK_COLUMNS, outputs - n);
        Left rows_of_a = rows_of(a, stride, columns);
        Ahead none = nothing_ahead();
        Lines made;
        Finish block = part_of(to, 0, n);
        block.out = made.at[0], block.stride = BLOCK_COLUMNS, block.streams = 0;
        multiply_and_finish(&rows_of_a, panels + n * columns, BLOCK_ROWS, width, &block, &none);
        pivot_of(made, width, pivot + n);
    }
}

/* A thread's own scratch: a tile of relu(norm(x)), the pivot. */
static int64_t own_scratch(int64_t columns, int64_t outputs) {
    return forward_rows(columns) * tile_stride(columns) + padded(outputs, BLOCK_COLUMNS);
}

/* Values of scratch that relu_norm_product needs. */
int64_t relu_norm_product_scratch(int64_t columns, int64_t outputs, int64_t threads) {
    return padded(outputs, BLOCK_COLUMNS) * columns + threads * own_scratch(columns, outputs);
}

/* out = relu(norm(x)) W^T of weight [outputs, columns], or, with `next` [4, outputs], another norm's vectors,
 * relu(next(relu(norm(x)) W^T)).
 * Unless `pivot` is NULL: it takes values [outputs] near out's, and a thread's sums [2, outputs] += those of
 * out - pivot, and of its squares. */
WIDE void relu_norm_product(const REAL *x, int64_t x_stride, int64_t rows, int64_t columns, const REAL *norm,
                            const REAL *weight, int64_t weight_stride, int64_t outputs, const REAL *next, REAL *out,
                            int64_t out_stride, REAL *pivot, double *sums, int64_t sums_stride, REAL *scratch,
                            int threads) {
    const REAL *scale = norm + 2 * columns, *shift = norm + 3 * columns;
    int64_t stride = tile_stride(columns), tile_rows = forward_rows(columns);
    int64_t padded_outputs = padded(outputs, BLOCK_COLUMNS);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        REAL *panels = scratch;
        REAL *a = panels + padded_outputs * columns + omp_get_thread_num() * own_scratch(columns, outputs);
        Ahead ahead = {.of = {{x, x_stride, columns}}};
        Finish all = {.out = out, .stride = out_stride, .streams = pivot && can_stream(out, out_stride)};
        if (next) all.scale = next + 2 * outputs, all.shift = next + 3 * outputs;
        pack_transposed(weight, weight_stride, outputs, columns, panels);
        if (pivot) {
            REAL *own_pivot = a + tile_rows * stride;
            find_pivot(x, x_stride, rows, columns, scale, shift, panels, outputs, all, a, stride, own_pivot);
            if (omp_get_thread_num() == 0) memcpy(pivot, own_pivot, outputs * sizeof(REAL));
            all.pivot = own_pivot;
            all.values = sums + omp_get_thread_num() * sums_stride, all.squares = all.values + outputs;
        }
        for (int64_t tile = own.first; tile < own.last; tile += tile_rows) {
            int64_t here = least(tile_rows, own.last - tile);
            int64_t steps = padded_outputs / BLOCK_COLUMNS * blocks(here, BLOCK_ROWS) * columns;
            look_ahead(&ahead, tile, here, own.last, steps);
            normalize(x + tile * x_stride, x_stride, here, columns, scale, shift, a, stride);
            for (int64_t n = 0; n < outputs; n += BLOCK_COLUMNS)
                for (int64_t row = 0; row < here; row += BLOCK_ROWS) {
                    /* Rows beyond the tile's last are whatever lies in scratch; they go nowhere. */
                    Left left = rows_of(a + row * stride, stride, columns);
                    Finish to = part_of(all, tile + row, n);
                    multiply_and_finish(&left, panels + n * columns, least(BLOCK_ROWS, here - row),
                                        least(BLOCK_COLUMNS, outputs - n), &to, &ahead);
                }
        }
        end_streams();
    }
}

/* Backward */

/* weight [outputs, columns] as panels [columns / BLOCK_COLUMNS][outputs][BLOCK_COLUMNS]. */
static void pack(const REAL *weight, int64_t weight_stride, int64_t outputs, int64_t columns, REAL *panels) {
#pragma omp for
    for (int64_t first = 0; first < columns; first += BLOCK_COLUMNS) {
        REAL *panel = panels + first * outputs;
        int64_t width = least(BLOCK_COLUMNS, columns - first);
        if (width < BLOCK_COLUMNS) memset(panel, 0, outputs * BLOCK_COLUMNS * sizeof(REAL));
        for (int64_t n = 0; n < outputs; n++)
            memcpy(panel + n * BLOCK_COLUMNS, weight + n * weight_stride + first, width * sizeof(REAL));
    }
}

/* A tile of grad's rows, each a whole number of blocks; what is beyond their values goes nowhere. */
static void copy_padded(const REAL *grad, int64_t grad_stride, int64_t rows, int64_t outputs, REAL *out,
                        int64_t stride) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(out + row * stride, grad + row * grad_stride, outputs * sizeof(REAL));
        for (int64_t n = outputs; n < padded(outputs, BLOCK_ROWS); n++) out[row * stride + n] = 0;
    }
}

/* A block of grad W, through relu(norm(x)) from there. */
static APART void multiply_and_pass(const Left *left, const REAL *panel, int64_t rows, int64_t columns,
                                    const Backward *to, Ahead *ahead) {
    if (is_whole(rows, columns)) {
        ask_for_block(to->x, to->x_stride);
        ask_for_block(to->x + BLOCK_COLUMNS, to->x_stride); /* the next panel's */
        if (to->grad_x && to->accumulates) ask_for_block(to->grad_x, to->grad_x_stride);
        pass_rows(multiply(*left, panel, VECTORS, ahead).rows, BLOCK_ROWS, *to);
        return;
    }
    Lines grad = multiply_some(*left, panel, columns, ahead);
    pass(&grad, 0, rows, columns, *to);
}

/* A panel of grad W over a tile's rows; `to` is where the tile begins. */
INLINE void pass_to_input(const REAL *g, int64_t stride, int64_t rows, int64_t outputs, const REAL *panel,
                          int64_t columns, Backward to, Ahead *ahead) {
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
        Left left = rows_of(g + row * stride, stride, outputs);
        multiply_and_pass(&left, panel, least(BLOCK_ROWS, rows - row), columns, &to, ahead);
        to.x += BLOCK_ROWS * to.x_stride, to.a += BLOCK_ROWS * to.a_stride;
        if (to.grad_x) to.grad_x += BLOCK_ROWS * to.grad_x_stride;
    }
}

/* What threads found; their panels lie `apart`. */
static void add_up(const REAL *parts, int64_t apart, int64_t outputs, int64_t columns, REAL *total) {
#pragma omp for collapse(2)
    for (int64_t n = 0; n < outputs; n += BLOCK_ROWS)
        for (int64_t c = 0; c < columns; c += BLOCK_COLUMNS)
            add_up_block(parts + c * padded(outputs, BLOCK_ROWS) + n * BLOCK_COLUMNS, apart,
                         least(BLOCK_ROWS, outputs - n), least(BLOCK_COLUMNS, columns - c), total + n * columns + c,
                         columns, 1);
}

/* A thread's own scratch: a tile of grad, a panel of a, the weight's gradient if needed. */
static int64_t tiles_of_backward(int64_t outputs) {
    return BACKWARD_ROWS * (tile_stride(padded(outputs, BLOCK_ROWS)) + BLOCK_COLUMNS);
}

static int64_t own_backward_scratch(int64_t columns, int64_t outputs, int needs_weight) {
    int64_t weight = padded(outputs, BLOCK_ROWS) * padded(columns, BLOCK_COLUMNS);
    return tiles_of_backward(outputs) + (needs_weight ? weight : 0);
}

/* Values of scratch that relu_norm_product_backward needs. */
int64_t relu_norm_product_backward_scratch(int64_t columns, int64_t outputs, int needs_weight, int64_t threads) {
    return outputs * padded(columns, BLOCK_COLUMNS) + threads * own_backward_scratch(columns, outputs, needs_weight);
}

/* From grad [rows, outputs], that of relu(norm(x)) W^T with weight [outputs, columns]:
 * grad_weight [outputs, columns], unless NULL;
 * unless `sums` is NULL, with dz the gradient of norm(x): a thread's sums [2, columns] += those of dz and of
 * dz * (x - mean); grad_x = scale * dz, or, if `accumulates`, grad_x += scale * dz; not written if NULL. */
WIDE void relu_norm_product_backward(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride,
                                     int64_t rows, int64_t columns, const REAL *norm, const REAL *weight,
                                     int64_t weight_stride, int64_t outputs, REAL *grad_x, int64_t grad_x_stride,
                                     int accumulates, double *sums, int64_t sums_stride, REAL *grad_weight,
                                     REAL *scratch, int threads) {
    const REAL *scale = norm + 2 * columns, *shift = norm + 3 * columns;
    int64_t padded_outputs = padded(outputs, BLOCK_ROWS), padded_columns = padded(columns, BLOCK_COLUMNS);
    int64_t stride = tile_stride(padded_outputs), own_tiles = tiles_of_backward(outputs);
    int64_t apart = own_backward_scratch(columns, outputs, grad_weight != NULL);
    REAL *panels = scratch, *parts = scratch + outputs * padded_columns;
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(rows);
        REAL *g = parts + omp_get_thread_num() * apart, *a = g + BACKWARD_ROWS * stride, *own_weight = g + own_tiles;
        double *dz = sums ? sums + omp_get_thread_num() * sums_stride : NULL;
        Ahead ahead = {.of = {{grad, grad_stride, outputs}, {x, x_stride, columns}}};
        if (grad_x) ahead.of[2].at = grad_x, ahead.of[2].stride = grad_x_stride, ahead.of[2].columns = columns;
        if (sums) pack(weight, weight_stride, outputs, columns, panels);
        memset(own_weight, 0, (apart - own_tiles) * sizeof(REAL));
        for (int64_t tile = own.first; tile < own.last; tile += BACKWARD_ROWS) {
            int64_t here = least(BACKWARD_ROWS, own.last - tile);
            int64_t of_weight = grad_weight ? padded_outputs / BLOCK_ROWS * here : 0;
            int64_t of_x = sums ? blocks(here, BLOCK_ROWS) * outputs : 0;
            look_ahead(&ahead, tile, here, own.last, padded_columns / BLOCK_COLUMNS * (of_weight + of_x));
            copy_padded(grad + tile * grad_stride, grad_stride, here, outputs, g, stride);
            for (int64_t c = 0; c < columns; c += BLOCK_COLUMNS) {
                const REAL *tile_x = x + tile * x_stride + c;
                REAL *tile_grad = grad_x ? grad_x + tile * grad_x_stride + c : NULL;
                int64_t width = least(BLOCK_COLUMNS, columns - c);
                normalize(tile_x, x_stride, here, width, scale + c, shift + c, a, BLOCK_COLUMNS);
                if (grad_weight)
                    add_weight_gradient(g, stride, here, outputs, a, BLOCK_COLUMNS, width,
                                        own_weight + c * padded_outputs, &ahead);
                if (!sums) continue;
                Backward to = {tile_x, a, x_stride, BLOCK_COLUMNS, norm + c, scale + c, tile_grad, grad_x_stride,
                               accumulates, 0, dz + c, dz + columns + c};
                pass_to_input(g, stride, here, outputs, panels + c * outputs, width, to, &ahead);
            }
        }
#pragma omp barrier
        if (grad_weight) add_up(parts + own_tiles, apart, outputs, columns, grad_weight);
    }
}

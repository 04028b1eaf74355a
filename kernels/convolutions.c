/* The CPU path's 3x3 and 3x3x3 convolutions of relu(norm(x)), padded with zeros, and backward through both.
 *
 * compiled.py builds this file once with REAL=float and once with REAL=double; convolutions.py calls it. As in
 * products.c threads share the lines of the images out in one fixed way, every sum has one fixed order, and a block
 * of a product is finished when it leaves the registers: written where it belongs, taken into its channel's
 * statistics, passed back through the norm. Nothing as large as the map is made on the way: tiles.h says what is.
 */
#include "tiles.h"

enum {
    WEIGHT_ROWS = 64 /* pixels of x and grad that are met by all taps in turn; 32 or 128 are no faster */
};

/* weight, `apart` = {from output to output, column to column, tap to tap}, as panels of outputs:
 * [outputs / BLOCK_COLUMNS][taps][columns][BLOCK_COLUMNS], zeros beyond the last. A few columns at a time, as many as
 * share a cache line of a channels-last weight, and of them a tap at a time: all of it would evict itself. */
static void pack_outputs(Maps maps, const REAL *weight, const int64_t apart[3], REAL *panels) {
    int64_t depth = maps.taps * maps.columns;
#pragma omp for collapse(2)
    for (int64_t first = 0; first < maps.outputs; first += BLOCK_COLUMNS)
        for (int64_t start = 0; start < maps.columns; start += LINE) {
            int64_t width = least(BLOCK_COLUMNS, maps.outputs - first), last = least(maps.columns, start + LINE);
            for (int64_t tap = 0; tap < maps.taps; tap++) {
                const REAL *from = weight + first * apart[0] + tap * apart[2];
                REAL *to = panels + first * depth + tap * maps.columns * BLOCK_COLUMNS;
                if (width < BLOCK_COLUMNS)
                    memset(to + start * BLOCK_COLUMNS, 0, (last - start) * BLOCK_COLUMNS * sizeof(REAL));
                for (int64_t j = 0; j < width; j++)
                    for (int64_t c = start; c < last; c++) to[c * BLOCK_COLUMNS + j] = from[j * apart[0] + c * apart[1]];
            }
        }
}

/* The same as panels of columns, for the way back, on which the filter is turned around:
 * [columns / BLOCK_COLUMNS][taps][outputs][BLOCK_COLUMNS]. */
static void pack_columns(Maps maps, const REAL *weight, const int64_t apart[3], REAL *panels) {
    int64_t depth = maps.taps * maps.outputs;
#pragma omp for collapse(2)
    for (int64_t first = 0; first < maps.columns; first += BLOCK_COLUMNS)
        for (int64_t n = 0; n < maps.outputs; n++)
            for (int64_t tap = 0; tap < maps.taps; tap++) {
                const REAL *from = weight + n * apart[0] + first * apart[1] + (maps.taps - 1 - tap) * apart[2];
                REAL *to = panels + first * depth + (tap * maps.outputs + n) * BLOCK_COLUMNS;
                for (int64_t j = 0; j < BLOCK_COLUMNS; j++) to[j] = first + j < maps.columns ? from[j * apart[1]] : 0;
            }
}

/* Forward */

static int64_t own_scratch(Maps maps) {
    return tile_pixels(maps) * maps.stride + BLOCK_ROWS * maps.taps * maps.columns + padded(maps.outputs, BLOCK_COLUMNS);
}

static int64_t output_panels(Maps maps) { return padded(maps.outputs, BLOCK_COLUMNS) * maps.taps * maps.columns; }

/* Values of scratch that relu_norm_convolution needs. */
int64_t relu_norm_convolution_scratch(int64_t planes, int64_t depth, int64_t height, int64_t width, int64_t dilation,
                                      int64_t columns, int64_t outputs, int64_t threads) {
    Maps maps = maps_of(planes, depth, height, width, dilation, columns, outputs);
    return output_panels(maps) + threads * own_scratch(maps);
}

/* Pixels far apart, and seldom all at one place of an image: values are taken relative to the mean of their outputs.
 * Every thread finds the same for itself; `a` is scratch for what the filter sees at each. */
static void find_pivot(Maps maps, const REAL *x, int64_t x_stride, int64_t images, const REAL *scale,
                       const REAL *shift, const REAL *panels, REAL *a, REAL *pivot) {
    int64_t depth = maps.taps * maps.columns, pixels = images * maps.depth * maps.height * maps.width;
    memset(a, 0, BLOCK_ROWS * depth * sizeof(REAL));
    for (int64_t i = 0; i < BLOCK_ROWS; i++) {
        int64_t pixel = pixels * (2 * i + 1) / (2 * BLOCK_ROWS + 1), line = pixel / maps.width;
        int64_t slice = line / maps.height % maps.depth, row = line % maps.height, at = pixel % maps.width;
        for (int64_t tap = 0; tap < maps.taps; tap++) {
            int64_t inward = (tap / SQUARE - maps.planes / 2) * maps.reach;
            int64_t down = (tap / SIDE % SIDE - 1) * maps.reach, right = (tap % SIDE - 1) * maps.reach;
            if (slice + inward < 0 || slice + inward >= maps.depth || row + down < 0 || row + down >= maps.height ||
                at + right < 0 || at + right >= maps.width)
                continue;
            normalize(x + (pixel + (inward * maps.height + down) * maps.width + right) * x_stride, x_stride, 1,
                      maps.columns, scale, shift, a + i * depth + tap * maps.columns, depth);
        }
    }
    for (int64_t n = 0; n < maps.outputs; n += BLOCK_COLUMNS) {
        int64_t width = least(BLOCK_COLUMNS, maps.outputs - n);
        Ahead none = nothing_ahead();
        pivot_of(multiply_some(rows_of(a, depth, depth), panels + n * depth, width, &none), width, pivot + n);
    }
}

/* Where a run of pixels lies. */
INLINE Finish finish_at(Strip strip, Run run, Finish all) { return part_of(all, strip.before + run.pixel, 0); }

/* A block of the convolution, from a pixel of the tile on, to where its pixels lie. */
static APART void multiply_and_finish(const Maps *maps, const Strip *strip, int64_t start, const Left *left,
                                      const REAL *panel, int64_t columns, const Finish *all, Ahead *ahead) {
    Run run = run_from(*maps, *strip, start, 0);
    if (is_whole(run.rows, columns)) {
        finish_rows(multiply(*left, panel, VECTORS, ahead).rows, BLOCK_ROWS, finish_at(*strip, run, *all));
        return;
    }
    Lines product = multiply_some(*left, panel, columns, ahead);
    for (; run.rows; run = run_from(*maps, *strip, start, run.row + run.rows))
        finish(&product, run.row, run.rows, columns, finish_at(*strip, run, *all));
}

/* A tile of x from a pixel on, as the taps see it that are there. */
INLINE Left seen_by_taps(const Maps *maps, const Strip *strip, const REAL *tile, int64_t pixel) {
    return (Left){tile + pixel * maps->stride, maps->stride, maps->columns, maps->around + strip->first * SQUARE,
                  (strip->last - strip->first) * SQUARE};
}

/* out [images, depth, height, width, outputs] = the convolution of relu(norm(x)), x [images, depth, height, width,
 * columns]. Unless `pivot` is NULL: it takes values [outputs] near out's, and a thread's sums [2, outputs] += those of
 * out - pivot, and of its squares. */
WIDE void relu_norm_convolution(const REAL *x, int64_t x_stride, int64_t images, int64_t planes, int64_t depth,
                                int64_t height, int64_t width, int64_t dilation, int64_t columns, const REAL *norm,
                                const REAL *weight, int64_t from_output, int64_t from_column, int64_t from_tap,
                                int64_t outputs, REAL *out, int64_t out_stride, REAL *pivot, double *sums,
                                int64_t sums_stride, REAL *scratch, int threads) {
    const REAL *scale = norm + 2 * columns, *shift = norm + 3 * columns;
    const int64_t apart[] = {from_output, from_column, from_tap};
    Maps maps = maps_of(planes, depth, height, width, dilation, columns, outputs);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * depth * height);
        REAL *panels = scratch, *tile = panels + output_panels(maps) + omp_get_thread_num() * own_scratch(maps);
        Ahead ahead = {.of = {{x + to_plane(maps, planes - 1) * x_stride, x_stride, columns}}};
        Finish all = {.out = out, .stride = out_stride, .streams = pivot && can_stream(out, out_stride)};
        pack_outputs(maps, weight, apart, panels);
        if (pivot) {
            REAL *windows = tile + tile_pixels(maps) * maps.stride, *own_pivot = windows + BLOCK_ROWS * maps.taps * columns;
            find_pivot(maps, x, x_stride, images, scale, shift, panels, windows, own_pivot);
            if (omp_get_thread_num() == 0) memcpy(pivot, own_pivot, outputs * sizeof(REAL));
            all.pivot = own_pivot;
            all.values = sums + omp_get_thread_num() * sums_stride, all.squares = all.values + outputs;
        }
        Strip strip;
        for (int64_t line = own.first; line < own.last; line += strip.count) {
            strip = strip_at(maps, line, own.last);
            int64_t seen = (strip.last - strip.first) * SQUARE * columns;
            look_ahead(&ahead, strip.before, strip.count * width, own.last * width,
                       blocks(outputs, BLOCK_COLUMNS) * blocks(strip.pixels, BLOCK_ROWS) * seen);
            lay_out(maps, strip, x + strip.before * x_stride, x_stride, columns, scale, shift, tile, maps.stride);
            for (int64_t n = 0; n < outputs; n += BLOCK_COLUMNS) {
                const REAL *panel = panels + n * maps.taps * columns + strip.first * SQUARE * columns * BLOCK_COLUMNS;
                Finish to = part_of(all, 0, n);
                for (int64_t p = 0; p < strip.pixels; p += BLOCK_ROWS) {
                    Left left = seen_by_taps(&maps, &strip, tile, p);
                    multiply_and_finish(&maps, &strip, p, &left, panel, least(BLOCK_COLUMNS, outputs - n), &to, &ahead);
                }
            }
        }
        end_streams();
    }
}

/* Backward */

/* Values of a thread's gradient of the weight, [taps][columns / BLOCK_COLUMNS][outputs][BLOCK_COLUMNS], with what is
 * beyond the last outputs and columns. */
static int64_t own_weight(Maps maps) {
    return maps.taps * padded(maps.outputs, BLOCK_ROWS) * padded(maps.columns, BLOCK_COLUMNS);
}

static int64_t own_backward_scratch(Maps maps, int needs_weight) {
    return tile_pixels(maps) * (maps.stride + maps.outputs) + (needs_weight ? own_weight(maps) : 0);
}

static int64_t column_panels(Maps maps) { return padded(maps.columns, BLOCK_COLUMNS) * maps.taps * maps.outputs; }

/* Values of scratch that relu_norm_convolution_backward needs. */
int64_t relu_norm_convolution_backward_scratch(int64_t planes, int64_t depth, int64_t height, int64_t width,
                                               int64_t dilation, int64_t columns, int64_t outputs, int needs_weight,
                                               int64_t threads) {
    Maps maps = maps_of(planes, depth, height, width, dilation, columns, outputs);
    return column_panels(maps) + threads * own_backward_scratch(maps, needs_weight);
}

/* A strip's part of the weight's gradient: for each tap, grad^T relu(norm(x)) at that distance. Pixels of zeros in
 * grad stand beside the ends of x's lines, so they add nothing to what is finite. */
INLINE void add_taps(Maps maps, Strip strip, const REAL *g, const REAL *a, REAL *weight, Ahead *ahead) {
    int64_t padded_columns = padded(maps.columns, BLOCK_COLUMNS), rows = padded(maps.outputs, BLOCK_ROWS);
    const REAL *own = g + maps.centre * maps.outputs;
    for (int64_t start = 0; start < strip.pixels; start += WEIGHT_ROWS)
        for (int64_t c = 0; c < maps.columns; c += BLOCK_COLUMNS)
            for (int64_t tap = strip.first * SQUARE; tap < strip.last * SQUARE; tap++)
                add_weight_gradient(own + start * maps.outputs, maps.outputs, least(WEIGHT_ROWS, strip.pixels - start),
                                    maps.outputs, a + start * maps.stride + maps.around[tap] + c, maps.stride,
                                    least(BLOCK_COLUMNS, maps.columns - c), weight + (tap * padded_columns + c) * rows,
                                    ahead);
}

/* What the gradient meets at a run of pixels; `to` is where the strip begins, `to.a` its tile. */
INLINE Backward backward_at(Maps maps, int64_t start, Run run, Backward to) {
    to.x += run.pixel * to.x_stride, to.grad_x += run.pixel * to.grad_x_stride;
    to.a += (start + run.row + maps.centre) * to.a_stride;
    return to;
}

/* A block of the gradient of relu(norm(x)), from a pixel of the tile on, through the norm from there. */
static APART void multiply_and_pass(const Maps *maps, const Strip *strip, int64_t start, const Left *left,
                                    const REAL *panel, int64_t columns, const Backward *to, Ahead *ahead) {
    Run run = run_from(*maps, *strip, start, 0);
    if (is_whole(run.rows, columns)) {
        Backward here = backward_at(*maps, start, run, *to);
        ask_for_block(here.x, here.x_stride);
        pass_rows(multiply(*left, panel, VECTORS, ahead).rows, BLOCK_ROWS, here);
        return;
    }
    Lines grad = multiply_some(*left, panel, columns, ahead);
    for (; run.rows; run = run_from(*maps, *strip, start, run.row + run.rows))
        pass(&grad, run.row, run.rows, columns, backward_at(*maps, start, run, *to));
}

/* A strip's gradient of relu(norm(x)) for a panel's columns; `to` as above. */
INLINE void pass_to_input(Maps maps, Strip strip, const REAL *g, const REAL *panel, int64_t columns, Backward to,
                          Ahead *ahead) {
    int64_t together = maps.reach == 1 ? SIDE : 1; /* taps that lie side by side, as values of a dense tile do */
    int64_t taps = (strip.last - strip.first) * SQUARE, shifts[MOST_TAPS];
    for (int64_t at = 0; at < taps / together; at++)
        shifts[at] = to_tap(&maps, strip.first * SQUARE + at * together) * maps.outputs;
    panel += strip.first * SQUARE * maps.outputs * BLOCK_COLUMNS;
    for (int64_t p = 0; p < strip.pixels; p += BLOCK_ROWS) {
        Left left = {g + p * maps.outputs, maps.outputs, together * maps.outputs, shifts, taps / together};
        multiply_and_pass(&maps, &strip, p, &left, panel, columns, &to, ahead);
    }
}

/* What threads found, to where the weight's gradient lies; their panels lie `from_part` apart. */
static void add_up(Maps maps, const REAL *parts, int64_t from_part, const int64_t apart[3], REAL *total) {
    int64_t padded_columns = padded(maps.columns, BLOCK_COLUMNS), rows = padded(maps.outputs, BLOCK_ROWS);
#pragma omp for collapse(2)
    for (int64_t n = 0; n < maps.outputs; n += BLOCK_ROWS)
        for (int64_t c = 0; c < maps.columns; c += BLOCK_COLUMNS)
            for (int64_t tap = 0; tap < maps.taps; tap++) /* which may lie in one cache line */
                add_up_block(parts + (tap * padded_columns + c) * rows + n * BLOCK_COLUMNS, from_part,
                             least(BLOCK_ROWS, maps.outputs - n), least(BLOCK_COLUMNS, maps.columns - c),
                             total + n * apart[0] + c * apart[1] + tap * apart[2], apart[0], apart[1]);
}

/* From grad [images, depth, height, width, outputs], that of the convolution of relu(norm(x)):
 * grad_weight, with the weight's strides, unless NULL;
 * unless grad_x is NULL, with dz the gradient of norm(x): grad_x = scale * dz [images, depth, height, width, columns],
 * and a thread's sums [2, columns] += those of dz and of dz * (x - mean). */
WIDE void relu_norm_convolution_backward(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride,
                                         int64_t images, int64_t planes, int64_t depth, int64_t height, int64_t width,
                                         int64_t dilation, int64_t columns, const REAL *norm, const REAL *weight,
                                         int64_t from_output, int64_t from_column, int64_t from_tap, int64_t outputs,
                                         REAL *grad_x, int64_t grad_x_stride, double *sums, int64_t sums_stride,
                                         REAL *grad_weight, REAL *scratch, int threads) {
    const REAL *scale = norm + 2 * columns, *shift = norm + 3 * columns;
    const int64_t apart[] = {from_output, from_column, from_tap};
    Maps maps = maps_of(planes, depth, height, width, dilation, columns, outputs);
    int64_t from_part = own_backward_scratch(maps, grad_weight != NULL);
    REAL *panels = scratch, *parts = panels + column_panels(maps);
    int streams = grad_x && can_stream(grad_x, grad_x_stride);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * depth * height);
        REAL *part = parts + omp_get_thread_num() * from_part;
        REAL *a = part + (grad_weight ? own_weight(maps) : 0), *g = a + tile_pixels(maps) * maps.stride;
        int64_t deepest = to_plane(maps, planes - 1);
        Ahead ahead = {.of = {{grad + deepest * grad_stride, grad_stride, outputs},
                              {x + deepest * x_stride, x_stride, columns}}};
        if (grad_x) pack_columns(maps, weight, apart, panels);
        if (grad_weight) memset(part, 0, own_weight(maps) * sizeof(REAL));
        Strip strip;
        for (int64_t line = own.first; line < own.last; line += strip.count) {
            strip = strip_at(maps, line, own.last);
            int64_t taps = (strip.last - strip.first) * SQUARE;
            int64_t of_weight = grad_weight ? blocks(outputs, BLOCK_ROWS) * strip.pixels : 0;
            int64_t of_x = grad_x ? blocks(strip.pixels, BLOCK_ROWS) * outputs : 0;
            look_ahead(&ahead, strip.before, strip.count * width, own.last * width,
                       blocks(columns, BLOCK_COLUMNS) * taps * (of_weight + of_x));
            const REAL *own_x = x + strip.before * x_stride;
            lay_out(maps, strip, own_x, x_stride, columns, scale, shift, a, maps.stride);
            lay_out(maps, strip, grad + strip.before * grad_stride, grad_stride, outputs, NULL, NULL, g, outputs);
            if (grad_weight) add_taps(maps, strip, g, a, part, &ahead);
            for (int64_t c = 0; grad_x && c < columns; c += BLOCK_COLUMNS) {
                double *dz = sums + omp_get_thread_num() * sums_stride + c;
                Backward to = {own_x + c, a + c, x_stride, maps.stride, norm + c, scale + c,
                               grad_x + strip.before * grad_x_stride + c, grad_x_stride, 0, streams, dz, dz + columns};
                pass_to_input(maps, strip, g, panels + c * maps.taps * outputs, least(BLOCK_COLUMNS, columns - c), to,
                              &ahead);
            }
        }
        end_streams();
#pragma omp barrier
        if (grad_weight) add_up(maps, parts, from_part, apart, grad_weight);
    }
}

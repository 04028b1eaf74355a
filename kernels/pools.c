/* The CPU path's pools of relu(norm(x)): a stem's maximum of 3x3 pixels, a transition's mean of 2x2, and backward.
 *
 * compiled.py builds this file once with REAL=float and once with REAL=double; pools.py calls it. A map is
 * [images, height, width, columns], its pixels `stride` values apart; windows lie two pixels apart. As in passes.c
 * lines of windows are shared out among the threads in one fixed way, and each thread has sums of its own, in double,
 * to which two pixels are added at a time.
 * Nothing as large as a map is made on the way: what is pooled is normalized as often as windows overlap.
 */
#include <math.h>

#include "rows.h"

enum { SIDE = 3, PLACES = SIDE * SIDE };

/* x and its norm, and how many windows there are. */
typedef struct {
    const REAL *x;
    int64_t stride, height, width, columns, window_rows, window_columns;
    const REAL *mean, *scale, *shift;
} Maps;

static Maps maps_of(const REAL *x, int64_t stride, int64_t height, int64_t width, int64_t columns, const REAL *norm,
                    int64_t window_rows, int64_t window_columns) {
    return (Maps){x, stride, height, width, columns, window_rows, window_columns,
                  norm, norm + 2 * columns, norm + 3 * columns};
}

/* Pixels of all images before one. */
INLINE int64_t pixel_at(const Maps *maps, int64_t image, int64_t row, int64_t column) {
    return (image * maps->height + row) * maps->width + column;
}

INLINE int64_t window_at(const Maps *maps, int64_t image, int64_t row, int64_t column) {
    return (image * maps->window_rows + row) * maps->window_columns + column;
}

/* The largest norm(x) of a 3x3 window, -inf where all are; unless NULL, `places` takes which of the nine it is, the
 * first at a tie. NaN wins over everything, as in PyTorch. ReLU may wait: of values below 0 none gets a gradient. */
INLINE void largest_of_pixels(const Maps *maps, const REAL *const pixels[PLACES], const int outside[PLACES],
                              REAL *largest, REAL *places) {
    const REAL *scale = maps->scale, *shift = maps->shift;
#pragma omp simd
    for (int64_t c = 0; c < maps->columns; c++) {
        REAL best = -(REAL)INFINITY, chosen = 0;
#pragma GCC unroll 9
        for (int place = 0; place < PLACES; place++) {
            REAL z = pixels[place][c] * scale[c] + shift[c];
            if (outside) z = outside[place] ? -(REAL)INFINITY : z;
            int better = (z > best) | (z != z);
            best = better ? z : best;
            chosen = better ? (REAL)place : chosen;
        }
        largest[c] = best;
        if (places) places[c] = chosen;
    }
}

INLINE void largest_of_window(const Maps *maps, int64_t image, int64_t row, int64_t column, REAL *largest,
                              REAL *places) {
    const REAL *pixels[PLACES], *middle = maps->x + pixel_at(maps, image, 2 * row, 2 * column) * maps->stride;
    int outside[PLACES], any = 0;
    for (int place = 0; place < PLACES; place++) {
        int64_t down = place / SIDE - 1, right = place % SIDE - 1;
        int64_t line = 2 * row + down, at = 2 * column + right;
        outside[place] = line < 0 || line >= maps->height || at < 0 || at >= maps->width;
        pixels[place] = outside[place] ? middle : middle + (down * maps->width + right) * maps->stride;
        any |= outside[place];
    }
    if (any)
        largest_of_pixels(maps, pixels, outside, largest, places);
    else
        largest_of_pixels(maps, pixels, NULL, largest, places);
}

/* out [images, (height + 1) / 2, (width + 1) / 2, columns] = the largest relu(norm(x)) of each window. */
void relu_norm_largest(const REAL *x, int64_t x_stride, int64_t images, int64_t height, int64_t width, int64_t columns,
                       const REAL *norm, REAL *out, int64_t out_stride, int threads) {
    Maps maps = maps_of(x, x_stride, height, width, columns, norm, (height + 1) / 2, (width + 1) / 2);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * maps.window_rows);
        for (int64_t line = own.first; line < own.last; line++)
            for (int64_t column = 0; column < maps.window_columns; column++) {
                REAL *largest = out + (line * maps.window_columns + column) * out_stride;
                largest_of_window(&maps, line / maps.window_rows, line % maps.window_rows, column, largest, NULL);
#pragma omp simd
                for (int64_t c = 0; c < columns; c++) largest[c] = relu(largest[c]);
            }
    }
}

/* out [images, height / 2, width / 2, columns] = the mean relu(norm(x)) of 2x2 pixels. */
void relu_norm_mean(const REAL *x, int64_t x_stride, int64_t images, int64_t height, int64_t width, int64_t columns,
                    const REAL *norm, REAL *out, int64_t out_stride, int threads) {
    Maps maps = maps_of(x, x_stride, height, width, columns, norm, height / 2, width / 2);
    const REAL *scale = maps.scale, *shift = maps.shift;
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * maps.window_rows);
        for (int64_t line = own.first; line < own.last; line++)
            for (int64_t column = 0; column < maps.window_columns; column++) {
                int64_t image = line / maps.window_rows, row = line % maps.window_rows;
                const REAL *upper = x + pixel_at(&maps, image, 2 * row, 2 * column) * x_stride;
                const REAL *lower = upper + width * x_stride;
                REAL *mean = out + (line * maps.window_columns + column) * out_stride;
#pragma omp simd
                for (int64_t c = 0; c < columns; c++) {
                    REAL total = relu(upper[c] * scale[c] + shift[c]);
                    total += relu(upper[x_stride + c] * scale[c] + shift[c]);
                    total += relu(lower[c] * scale[c] + shift[c]);
                    total += relu(lower[x_stride + c] * scale[c] + shift[c]);
                    mean[c] = total * (REAL)0.25;
                }
            }
    }
}

/* Backward */

/* Where the gradient of norm(x) goes, dz. */
typedef struct {
    REAL *grad_x; /* scale * dz, less the terms; NULL: not yet */
    int64_t stride;
    const REAL *constant, *slope; /* of the statistics' being functions of x: constant + (x - mean) * slope; or NULL */
    double *dz, *dz_x;            /* a thread's sums of dz and dz * (x - mean); NULL: known */
} Backward;

static Backward backward_of(int64_t columns, const REAL *terms, double *sums, int64_t sums_stride, REAL *grad_x,
                            int64_t grad_x_stride) {
    Backward to = {.grad_x = grad_x, .stride = grad_x_stride};
    if (terms) to.constant = terms, to.slope = terms + columns;
    if (sums) to.dz = sums + omp_get_thread_num() * sums_stride, to.dz_x = to.dz + columns;
    return to;
}

/* What a value of a channel meets on its way back, and a thread's sums of it. */
INLINE REAL pass(REAL grad, REAL x, REAL mean, REAL scale, REAL shift, REAL *dz_of_all, REAL *dz_x_of_all) {
    REAL dz = relu_backward(grad, x * scale + shift);
    *dz_of_all += dz, *dz_x_of_all += dz * (x - mean);
    return scale * dz;
}

/* A pixel of the mean or two, side by side, with one gradient. */
INLINE void pass_mean(const Maps *maps, int64_t pixel, int pixels, const REAL *grad, const Backward *to) {
    const REAL *mean = maps->mean, *scale = maps->scale, *shift = maps->shift;
    const REAL *x = maps->x + pixel * maps->stride, *x_beside = x + maps->stride;
    REAL *grad_x = to->grad_x + pixel * to->stride, *beside = grad_x + to->stride;
#pragma omp simd
    for (int64_t c = 0; c < maps->columns; c++) {
        REAL here = grad[c] * (REAL)0.25, dz = 0, dz_x = 0;
        grad_x[c] = pass(here, x[c], mean[c], scale[c], shift[c], &dz, &dz_x);
        if (pixels == 2) beside[c] = pass(here, x_beside[c], mean[c], scale[c], shift[c], &dz, &dz_x);
        to->dz[c] += dz, to->dz_x[c] += dz_x;
    }
}

/* From grad [images, height / 2, width / 2, columns], that of the mean: grad_x = scale * dz, and a thread's sums
 * [2, columns] += those of dz and of dz * (x - mean). An odd last line or pixel lies in no window. */
void relu_norm_mean_backward(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride, int64_t images,
                             int64_t height, int64_t width, int64_t columns, const REAL *norm, double *sums,
                             int64_t sums_stride, REAL *grad_x, int64_t grad_x_stride, const REAL *zeros,
                             int threads) {
    Maps maps = maps_of(x, x_stride, height, width, columns, norm, height / 2, width / 2);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * height);
        Backward to = backward_of(columns, NULL, sums, sums_stride, grad_x, grad_x_stride);
        for (int64_t line = own.first; line < own.last; line++) {
            int64_t row = line % height / 2;
            int inside = row < maps.window_rows;
            const REAL *window = grad + window_at(&maps, line / height, row, 0) * grad_stride;
            for (int64_t column = 0; column < width; column += 2) {
                int whole = column + 1 < width;
                const REAL *here = inside && whole ? window + column / 2 * grad_stride : zeros;
                if (whole)
                    pass_mean(&maps, line * width + column, 2, here, &to);
                else
                    pass_mean(&maps, line * width + column, 1, here, &to);
            }
        }
    }
}

/* A line of windows: which of the nine pixels of each is its largest. */
static void choose(const Maps *maps, int64_t image, int64_t row, REAL *largest, REAL *places) {
    for (int64_t column = 0; column < maps->window_columns; column++)
        largest_of_window(maps, image, row, column, largest, places + column * maps->columns);
}

/* What a pixel gets from windows side by side, one or two, as their place `place`, and the one before. */
INLINE REAL gather(const REAL *places, const REAL *grad, int64_t columns, int64_t grad_stride, int windows, REAL place,
                   int64_t c) {
    REAL total = places[c] == place ? grad[c] : 0;
    if (windows == 2) total += places[columns + c] == place - 2 ? grad[grad_stride + c] : 0;
    return total;
}

/* One line of windows, and which pixels of each are its largest. */
typedef struct {
    const REAL *places, *grad;
} Windows;

/* A pixel in the middle line of `windows` windows, one or two, the `inner`th of the first one's three, and the one below
 * it; `lines`: 1 if there is none, 3 if that lies in the next line's windows, too. */
INLINE void pass_largest(const Maps *maps, int64_t pixel, int inner, int windows, int lines, int64_t grad_stride,
                         Windows line, Windows next, const Backward *to) {
    const REAL *mean = maps->mean, *scale = maps->scale, *shift = maps->shift;
    const REAL *x = maps->x + pixel * maps->stride, *x_below = x + maps->width * maps->stride;
    REAL *grad_x = to->grad_x ? to->grad_x + pixel * to->stride : NULL;
    REAL *below = grad_x ? grad_x + maps->width * to->stride : NULL;
    const REAL *constant = to->constant, *slope = to->slope;
    double *all_dz = to->dz, *all_dz_x = to->dz_x;
    int64_t columns = maps->columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
        REAL dz = 0, dz_x = 0, upper, lower = 0;
        REAL given = gather(line.places, line.grad, columns, grad_stride, windows, inner + SIDE, c);
        upper = pass(given, x[c], mean[c], scale[c], shift[c], &dz, &dz_x);
        if (lines > 1) {
            given = gather(line.places, line.grad, columns, grad_stride, windows, inner + 2 * SIDE, c);
            if (lines > 2) given += gather(next.places, next.grad, columns, grad_stride, windows, inner, c);
            lower = pass(given, x_below[c], mean[c], scale[c], shift[c], &dz, &dz_x);
        }
        if (constant) {
            upper -= constant[c] + (x[c] - mean[c]) * slope[c];
            if (lines > 1) lower -= constant[c] + (x_below[c] - mean[c]) * slope[c];
        }
        if (grad_x) {
            grad_x[c] = upper;
            if (lines > 1) below[c] = lower;
        }
        if (all_dz) all_dz[c] += dz, all_dz_x[c] += dz_x;
    }
}

/* A line of windows' own two lines of pixels, or the one that there is. */
INLINE void pass_lines(const Maps *maps, int64_t pixel, int lines, int64_t grad_stride, Windows line, Windows next,
                       const Backward *to) {
    for (int64_t column = 0; column < maps->width; column++) {
        int64_t window = column / 2, places = window * maps->columns, grads = window * grad_stride;
        Windows here = {line.places + places, line.grad + grads}, after = {next.places + places, next.grad + grads};
        if (column % 2 && window + 1 < maps->window_columns)
            pass_largest(maps, pixel + column, 2, 2, lines, grad_stride, here, after, to);
        else
            pass_largest(maps, pixel + column, 1 + column % 2, 1, lines, grad_stride, here, after, to);
    }
}

/* A thread's scratch: the largest values of a window, and the places of two lines of windows. */
static int64_t own_scratch(int64_t width, int64_t columns) { return (1 + 2 * ((width + 1) / 2)) * columns; }

/* Values of scratch that relu_norm_largest_backward needs. */
int64_t relu_norm_largest_backward_scratch(int64_t width, int64_t columns, int64_t threads) {
    return threads * own_scratch(width, columns);
}

/* From grad [images, (height + 1) / 2, (width + 1) / 2, columns], that of the maxima.
 * Unless `sums` is NULL, a thread's [2, columns] += those of dz and of dz * (x - mean). Unless grad_x is NULL,
 * grad_x = scale * dz, less constant + (x - mean) * slope where `terms` [2, columns] are given. */
void relu_norm_largest_backward(const REAL *grad, int64_t grad_stride, const REAL *x, int64_t x_stride,
                                int64_t images, int64_t height, int64_t width, int64_t columns, const REAL *norm,
                                const REAL *terms, double *sums, int64_t sums_stride, REAL *grad_x,
                                int64_t grad_x_stride, REAL *scratch, int threads) {
    Maps maps = maps_of(x, x_stride, height, width, columns, norm, (height + 1) / 2, (width + 1) / 2);
#pragma omp parallel num_threads(threads)
    {
        Range own = own_rows(images * maps.window_rows);
        REAL *largest = scratch + omp_get_thread_num() * own_scratch(width, columns), *places = largest + columns;
        REAL *next_places = places + maps.window_columns * columns;
        Backward to = backward_of(columns, terms, sums, sums_stride, grad_x, grad_x_stride);
        for (int64_t at = own.first; at < own.last; at++) {
            int64_t image = at / maps.window_rows, row = at % maps.window_rows;
            int64_t pixel = pixel_at(&maps, image, 2 * row, 0);
            int has_next = row + 1 < maps.window_rows;
            if (at == own.first || row == 0) choose(&maps, image, row, largest, places);
            if (has_next) choose(&maps, image, row + 1, largest, next_places);
            Windows line = {places, grad + at * maps.window_columns * grad_stride};
            Windows next = {next_places, line.grad + maps.window_columns * grad_stride};
            if (has_next)
                pass_lines(&maps, pixel, 3, grad_stride, line, next, &to);
            else if (2 * row + 1 < height)
                pass_lines(&maps, pixel, 2, grad_stride, line, line, &to);
            else
                pass_lines(&maps, pixel, 1, grad_stride, line, line, &to);
            REAL *spare = places;
            places = next_places, next_places = spare;
        }
    }
}

/* Tiles of maps for convolutions, 3x3 and 3x3x3: whatever the filter sees from some lines of an image.
 *
 * A tile is some lines of one image, with as many lines above and below as the filter reaches (its dilation), and as
 * many pixels of zeros to the left of each line: those on a line's right are the next line's. Its pixels are counted
 * through, p = line * (width + dilation) + column, so a tap of the filter is the same tile, some pixels further on,
 * and the convolution a product whose left operand is read once for each tap. Of the blocks' rows, those at pixels of
 * zeros go nowhere: without dilation 2 % at 56 pixels a line, 13 % at 7. Zeros are multiplied like any pixel: what is
 * not finite makes NaN of them, in gradients of more taps than it meets.
 *
 * An image of a volume is one of its slices, and a tile has three planes: the same lines of the slice and of the two
 * that the filter reaches. Taps in a slice that is not there are left out.
 */
#ifndef TILES_H
#define TILES_H

#include "blocks.h"

enum {
    SIDE = 3,
    SQUARE = SIDE * SIDE,
    MOST_TAPS = SIDE * SQUARE,
    TILE_BYTES = 256 * 1024 /* of x; measured with 1 MiB of second cache a core */
};

/* The maps, the filter, and how a tile of them is laid out. */
typedef struct {
    int64_t depth, height, width, columns, outputs;
    int64_t planes, taps;      /* of the filter; planes: 1, or SIDE for volumes */
    int64_t reach;             /* pixels from tap to tap: the dilation */
    int64_t line;              /* pixels of a tile's line with its zeros */
    int64_t lines;             /* of a tile's output, at most */
    int64_t plane;             /* pixels of a tile's plane */
    int64_t centre;            /* the tile's pixel at which its output begins */
    int64_t stride;            /* of a tile of x, from pixel to pixel; one of grad is dense */
    int64_t around[MOST_TAPS]; /* from a pixel's first tap to each, in a tile of x */
} Maps;

/* Pixels of a tile from a pixel's first tap to another. */
static int64_t to_tap(const Maps *maps, int64_t tap) {
    int64_t down = tap / SIDE % SIDE * maps->reach, right = tap % SIDE * maps->reach;
    return tap / SQUARE * maps->plane + down * maps->line + right;
}

static Maps maps_of(int64_t planes, int64_t depth, int64_t height, int64_t width, int64_t dilation, int64_t columns,
                    int64_t outputs) {
    Maps maps = {.depth = depth, .height = height, .width = width, .columns = columns, .outputs = outputs};
    maps.planes = planes, maps.taps = planes * SQUARE, maps.reach = dilation;
    maps.line = width + dilation, maps.stride = tile_stride(columns);
    int64_t around = (SIDE - 1) * dilation; /* lines that are not the output's */
    int64_t fit = TILE_BYTES / (int64_t)sizeof(REAL) / maps.stride / maps.line / planes - around;
    maps.lines = blocks(height, blocks(height, fit < 1 ? 1 : fit)); /* all tiles of an image alike */
    maps.plane = (maps.lines + around) * maps.line + around;
    maps.centre = to_tap(&maps, maps.taps / 2);
    for (int64_t tap = 0; tap < maps.taps; tap++) maps.around[tap] = to_tap(&maps, tap) * maps.stride;
    return maps;
}

/* Pixels of a tile, and what blocks read beyond them. */
static int64_t tile_pixels(Maps maps) { return maps.planes * maps.plane + BLOCK_ROWS; }

/* Some lines of one image's output: how many, the first of them in the image, which planes there are, the pixels
 * before them in all images, and their own in a tile, zeros included. */
typedef struct {
    int64_t count, row, first, last, before, pixels;
} Strip;

static Strip strip_at(Maps maps, int64_t line, int64_t end) {
    int64_t row = line % maps.height, slice = line / maps.height % maps.depth, first = 0, last = maps.planes;
    if (maps.planes == SIDE) first = slice < maps.reach, last -= slice + maps.reach >= maps.depth;
    int64_t count = least(least(maps.lines, maps.height - row), end - line);
    return (Strip){count, row, first, last, line * maps.width, count * maps.line};
}

/* Pixels of the maps from a strip to the same lines of another plane. */
static int64_t to_plane(Maps maps, int64_t plane) {
    return (plane - maps.planes / 2) * maps.reach * maps.height * maps.width;
}

/* Lays a strip of relu(norm(x)) out as a plane of a tile; of x itself where `scale` is NULL. `x` is the strip's first
 * pixel in that plane. */
INLINE void lay_out_plane(Maps maps, Strip strip, const REAL *x, int64_t x_stride, int64_t columns, const REAL *scale,
                          const REAL *shift, REAL *tile, int64_t stride) {
    for (int64_t line = -maps.reach; line < strip.count + maps.reach; line++, tile += maps.line * stride) {
        int inside = strip.row + line >= 0 && strip.row + line < maps.height;
        memset(tile, 0, (inside ? maps.reach : maps.line) * stride * sizeof(REAL));
        if (!inside) continue;
        const REAL *from = x + line * maps.width * x_stride;
        REAL *to = tile + maps.reach * stride;
        if (scale)
            normalize(from, x_stride, maps.width, columns, scale, shift, to, stride);
        else
            for (int64_t q = 0; q < maps.width; q++)
                memcpy(to + q * stride, from + q * x_stride, columns * sizeof(REAL));
    }
    /* To the right of the last line, and as many more: what the last taps see from the zeros there, where 0 times
     * whatever lies in scratch might be NaN. */
    memset(tile, 0, (SIDE - 1) * maps.reach * stride * sizeof(REAL));
}

INLINE void lay_out(Maps maps, Strip strip, const REAL *x, int64_t x_stride, int64_t columns, const REAL *scale,
                    const REAL *shift, REAL *tile, int64_t stride) {
    for (int64_t plane = strip.first; plane < strip.last; plane++)
        lay_out_plane(maps, strip, x + to_plane(maps, plane) * x_stride, x_stride, columns, scale, shift,
                      tile + plane * maps.plane * stride, stride);
}

/* The pixels of a block that are none of the zeros, a line at a time. */
typedef struct {
    int64_t row, rows; /* of the block */
    int64_t pixel;     /* of the strip's own */
} Run;

/* The run at or after a row of the block that begins at a pixel of the tile; none where rows is 0. */
INLINE Run run_from(Maps maps, Strip strip, int64_t start, int64_t row) {
    int64_t line = (start + row) / maps.line, at = (start + row) % maps.line;
    if (at >= maps.width) row += maps.line - at, line++, at = 0;
    if (row >= BLOCK_ROWS || line >= strip.count) return (Run){0};
    return (Run){row, least(BLOCK_ROWS - row, maps.width - at), line * maps.width + at};
}

#endif

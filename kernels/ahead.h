/* What is asked for ahead of its use: the next tile's rows of some matrices, while this one is multiplied.
 *
 * A few cache lines before each chain of multiply-adds, as many as are due by then. A core waits for a dozen lines at
 * once or so; whole rows of a thousand channels, asked for in one go, hold up what comes from the second cache
 * meanwhile. Everything is inlined: around a call a block's sums would have to leave the registers.
 */
#ifndef AHEAD_H
#define AHEAD_H

#include "rows.h"

enum { MATRICES = 3, NEVER = 1 << 30 };

typedef struct {
    struct {
        const REAL *at; /* NULL: none */
        int64_t stride, columns;
    } of[MATRICES];
    int64_t row, matrix, last; /* of the next tile: what is asked for next, and where it ends */
    const REAL *line, *end;    /* and of that row */
    int64_t every, wait;       /* multiply-adds of a block from line to line, and until the next */
} Ahead;

/* Where there is nothing to ask for. */
INLINE Ahead nothing_ahead(void) { return (Ahead){.wait = NEVER}; }

/* At the beginning of a tile of so many multiply-adds of blocks. */
INLINE void look_ahead(Ahead *ahead, int64_t tile, int64_t rows, int64_t last, int64_t multiply_adds) {
    int64_t lines = 0;
    ahead->row = least(last, tile + rows), ahead->last = least(last, tile + 2 * rows);
    ahead->matrix = 0, ahead->line = ahead->end = NULL;
    for (int m = 0; m < MATRICES; m++)
        if (ahead->of[m].at) lines += (ahead->last - ahead->row) * blocks(ahead->of[m].columns, LINE);
    ahead->wait = 0, ahead->every = !lines ? NEVER : multiply_adds > lines ? multiply_adds / lines : 1;
}

/* On to the next row; 0 if there is none. */
INLINE int next_row(Ahead *ahead) {
    for (; ahead->row < ahead->last; ahead->row++, ahead->matrix = 0)
        while (ahead->matrix < MATRICES) {
            int64_t m = ahead->matrix++;
            if (!ahead->of[m].at) continue;
            ahead->line = ahead->of[m].at + ahead->row * ahead->of[m].stride;
            ahead->end = ahead->line + ahead->of[m].columns;
            return 1;
        }
    return 0;
}

/* Before so many multiply-adds. Into the second cache, not the first, which is the panel's and the tile's. What cannot
 * be read is not fetched. */
INLINE void ask(Ahead *ahead, int64_t multiply_adds) {
    for (ahead->wait -= multiply_adds; ahead->wait < 0; ahead->wait += ahead->every) {
        if (ahead->line >= ahead->end && !next_row(ahead)) {
            ahead->wait = NEVER;
            return;
        }
        __builtin_prefetch(ahead->line, 0, 2);
        ahead->line += LINE;
    }
}

#endif

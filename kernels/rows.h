/* What every loop over rows shares. REAL is float or double. */
#ifndef ROWS_H
#define ROWS_H

#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { CACHE_LINE = 64, LINE = CACHE_LINE / sizeof(REAL) }; /* bytes, values */

#if defined(__clang__) && defined(__AVX512F__)
#define WIDE __attribute__((min_vector_width(512))) /* or it halves vectors, and a block no longer fits */
#else
#define WIDE
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART WIDE __attribute__((noinline, unused))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t blocks(int64_t values, int64_t block) { return (values + block - 1) / block; }

typedef struct {
    int64_t first, last;
} Range;

/* The rows of the thread that asks. */
static inline Range own_rows(int64_t rows) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Range){rows * thread / threads, rows * (thread + 1) / threads};
}

/* NaN passes, as it does in PyTorch. */
static inline REAL relu(REAL z) { return z <= 0 ? 0 : z; }

/* z may be relu(z): the two have one sign. */
static inline REAL relu_backward(REAL grad, REAL z) { return z <= 0 ? 0 : grad; }

/* What a matrix holds: REAL, or with BFLOAT16, whose REAL is float, the upper half of a float's bits. */
#if defined(BFLOAT16)
typedef uint16_t Stored;

INLINE REAL loaded(Stored value) {
    uint32_t bits = (uint32_t)value << 16;
    REAL wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, at a tie the even one; NaN stays NaN. */
INLINE Stored stored(REAL value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (Stored)(value != value ? 0x7fc0 : rounded);
}
#else
typedef REAL Stored;

INLINE REAL loaded(Stored value) { return value; }

INLINE Stored stored(REAL value) { return value; }
#endif

#endif

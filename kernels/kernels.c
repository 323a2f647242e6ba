// Loops that torch has no operator for. build.py compiles them on first use. Arrays are row-major.

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

// Floats in one register. The compiler splits wider vectors badly: with 16 on AVX2 the loops over streams take eight to ten
// times as long.
#if !defined WIDTH && defined __AVX512F__
#define WIDTH 16
#elif !defined WIDTH && defined __AVX2__
#define WIDTH 8
#elif !defined WIDTH
#define WIDTH 4
#endif
enum { LANES = WIDTH };
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Places __attribute__((vector_size(4 * LANES)));

// -- a quantised matrix (bits/coded_matrix.py and trellis.py) ---------------------------------------

enum { WINDOW = 12, DEPTHS = 17, SEGMENT = 1024 };  // as in bits/; depths are 0 to 16 half bits
enum { STEP = 32 };                                 // after this many numbers a stream of any depth begins a new byte
enum { TOUCHED = 16 };                              // bytes that loading eight windows touches, at most

static inline uint64_t load(const uint8_t *bytes) {
    uint64_t x;
    memcpy(&x, bytes, 8);
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap64(x) : x;
}

// A window gives v numbers and adds b bits. Eight windows of eight bits do not fit into one load.
static inline void read_eight(const uint8_t *stream, int b, int v, const float *restrict levels, float *restrict out) {
    uint64_t first = load(stream), last = load(stream + b / 2), mask = (1 << WINDOW) - 1;
    for (int i = 0; i < 4; i++) {
        memcpy(out + v * i, levels + v * (first >> (64 - WINDOW - i * b) & mask), 4 * v);
        memcpy(out + v * (i + 4), levels + v * (last >> (64 - WINDOW - b % 2 * 4 - i * b) & mask), 4 * v);
    }
}

static inline void read_all(const uint8_t *stream, const uint8_t *end, int n, int b, int v, const float *restrict levels,
                            float *restrict out) {
    int all = (n + 8 * v - 1) / (8 * v), inside = end - stream < TOUCHED ? 0 : (end - stream - TOUCHED) / b + 1;
    inside = inside < all ? inside : all;
    for (int i = 0; i < inside; i++) read_eight(stream + i * b, b, v, levels, out + 8 * v * i);
    for (int i = inside; i < all; i++) {
        uint8_t rest[TOUCHED] = {0};
        if (stream + i * b < end) memcpy(rest, stream + i * b, end - stream - i * b);
        read_eight(rest, b, v, levels, out + 8 * v * i);
    }
}

static void read_numbers(const uint8_t *stream, const uint8_t *end, int n, int depth, const float *levels, float *out) {
#define CASE(d) case d: read_all(stream, end, n, d % 2 ? d : d / 2, 1 + d % 2, levels, out); break;
    switch (depth) {  // so that the compiler knows the shifts
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(10) CASE(12) CASE(14) CASE(16)
    }
}

typedef struct {  // a row group. streams, sizes, levels: [DEPTHS], for the columns of each depth
    int rows, count, length;  // a column has `count` streams of `length` numbers
    const uint8_t *depths, *const *streams;
    const int32_t *order;
    const int64_t *sizes;
    const float *const *levels;
} Group;

#define MATRIX \
    int groups, int columns, const int32_t *layout, const uint8_t *depths, const int32_t *order, const uint8_t *const *streams, \
    const int64_t *sizes, const float *const *levels
#define GROUP(g) \
    {layout[3 * (g)], layout[3 * (g) + 1], layout[3 * (g) + 2], depths + (g) * (int64_t)columns, streams + (g) * DEPTHS, \
     order + (g) * (int64_t)columns, sizes + (g) * DEPTHS, levels}

// The levels of column order[c] in n rows of a segment, from row `first` on, a multiple of STEP -> whether it has bits.
// seen: columns of the same depth before it, counted here. Writes up to 15 numbers more than n.
static int read_column(const Group *group, int c, int *seen, int segment, int first, int n, float *out) {
    int depth = group->depths[group->order[c]], v = 1 + depth % 2, b = depth * v / 2;
    if (!depth) return 0;
    *seen = c && group->depths[group->order[c - 1]] == depth ? *seen + 1 : 0;
    int64_t size = (WINDOW + (group->length / v - 1) * b + 7) / 8, place = (int64_t)*seen * group->count + segment;
    const uint8_t *streams = group->streams[depth], *stream = streams + place * size + first / v * b / 8;
    for (int i = 0; i < n / v * b / 8; i += 64) __builtin_prefetch(stream + group->count * size + i);  // the next column
    read_numbers(stream, streams + group->sizes[depth], n, depth, group->levels[depth], out);
    return 1;
}

static inline int least(int a, int b) { return a < b ? a : b; }

// The first arguments of the next three are a matrix: layout [groups][3] has rows, count and length of each Group; depths
// [groups][columns]; order [groups][columns], columns by depth, so that a codebook stays in the processor's first cache;
// streams and sizes [groups][DEPTHS], bytes and their count; levels [DEPTHS].

// out [tokens][rows] += x [tokens][groups][columns], already multiplied by the scales, times the levels.
void coded_product(MATRIX, int tokens, const float *x, float *out, int threads) {
    int64_t rows = 0, start = 0;
    for (int g = 0; g < groups; g++) rows += layout[3 * g];
    int each = (rows + threads - 1) / threads, step = least(SEGMENT, (each + STEP - 1) / STEP * STEP);  // rows of a part
    #pragma omp parallel num_threads(threads) firstprivate(start)
    for (int g = 0; g < groups; start += layout[3 * g++]) {
        Group group = GROUP(g);
        int parts = (group.length + step - 1) / step;
        #pragma omp for schedule(dynamic) nowait
        for (int part = 0; part < group.count * parts; part++) {
            int segment = part / parts, first = part % parts * step, row = segment * group.length + first;
            int n = least(least(step, group.length - first), group.rows - row);
            for (int c = 0, seen; c < columns && n > 0; c++) {
                float numbers[SEGMENT + 16];
                if (!read_column(&group, c, &seen, segment, first, n, numbers)) continue;
                for (int k = 0; k < tokens; k++) {
                    float *restrict into = out + k * rows + start + row;
                    float factor = x[((int64_t)k * groups + g) * columns + group.order[c]];
                    for (int t = 0; t < n; t++) into[t] += factor * numbers[t];
                }
            }
        }
    }
}

// out [columns][rows from segment `from` to segment `to`]: the levels in group g; columns without bits are not written.
void coded_columns(MATRIX, int g, int from, int to, float *out, int threads) {
    Group group = GROUP(g);
    int start = from * group.length, width = least(group.rows, to * group.length) - start;
    #pragma omp parallel for num_threads(threads)
    for (int segment = from; segment < to; segment++) {
        int n = least(group.length, group.rows - segment * group.length);
        for (int c = 0, seen; c < columns; c++) {
            float numbers[SEGMENT + 16], *into = out + (int64_t)group.order[c] * width + segment * group.length - start;
            if (read_column(&group, c, &seen, segment, 0, n, numbers)) memcpy(into, numbers, sizeof(float) * n);
        }
    }
}

// out [n][columns]: the levels of single rows; at [n][2]: group and index there. Columns without bits are not written.
void coded_rows(MATRIX, int n, const int64_t *at, float *out, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int i = 0; i < n; i++) {
        Group group = GROUP(at[2 * i]);
        int segment = at[2 * i + 1] / group.length, row = at[2 * i + 1] % group.length, first = row / STEP * STEP;
        for (int c = 0, seen; c < columns; c++) {
            float numbers[STEP + 16];
            if (read_column(&group, c, &seen, segment, first, row - first + 1, numbers))
                out[(int64_t)i * columns + group.order[c]] = numbers[row - first];
        }
    }
}

// numbers [n][rows], in place: each times its row's scale, plus the row's factor times the number of its parent (above).
// parent [rows]: int32 if `wide`, else uint16; relation [rows]: indices of a factor and of a scale, half a byte each.
void coded_parents(int rows, int wide, const void *parent, const uint8_t *relation, const float *factors, const float *gains,
                   int n, float *numbers, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int i = 0; i < n; i++) {
        float *of = numbers + (int64_t)i * rows;
        for (int row = 0; row < rows; row++) {
            int from = wide ? ((const int32_t *)parent)[row] : ((const uint16_t *)parent)[row];
            of[row] = gains[relation[row] & 15] * of[row] + factors[relation[row] >> 4] * of[from];
        }
    }
}

// -- attention over a cache's rows (kv_cache/number_formats.py) --------------------------------------------------------------

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // number formats, as in kv_cache/__init__.py
enum { WIDEST = 1024, PIECE = 64 };  // most numbers per head; numbers that are summed together
enum { BLOCK = 64, SIDE = 8 };       // positions of a task; positions that are read together

static inline float from_bfloat(uint16_t half) {  // the upper half of a float32
    uint32_t whole = (uint32_t)half << 16;
    float x;
    memcpy(&x, &whole, 4);
    return x;
}

static inline float from_half(uint16_t half) {
    uint32_t whole = (uint32_t)(half & 0x7fff) << 13;  // the bits in a float32's positions: 2^112 too small
    float x;
    memcpy(&x, &whole, 4);
    x *= 0x1p112f;
    memcpy(&whole, &x, 4);
    whole |= (uint32_t)(half & 0x8000) << 16 | ((half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);  // the sign; infinity and NaN
    memcpy(&x, &whole, 4);
    return x;
}

static inline void from_halves(const uint16_t *halves, int n, float *restrict out) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
    for (; i < n; i++) out[i] = from_half(halves[i]);
}

// n numbers of a row of `width` -> floats, from number `first` on, without the row's scale
static __attribute__((noinline)) void as_floats(const uint8_t *row, int format, int width, int first, int n, float *restrict out) {
    const uint16_t *halves = (const uint16_t *)row + first;
    const int8_t *bytes = (const int8_t *)row;
    switch (format) {
    case FLOAT32: memcpy(out, row + 4 * first, 4 * n); break;
    case BFLOAT16: for (int i = 0; i < n; i++) out[i] = from_bfloat(halves[i]); break;
    case FLOAT16: from_halves(halves, n, out); break;
    case INT8: for (int i = 0; i < n; i++) out[i] = bytes[first + i]; break;
    case INT4: {  // the first half of the numbers lie in the bytes' low halves
        int half = (width + 1) / 2, low = least(n, half - first);
        for (int i = 0; i < low; i++) out[i] = (int8_t)((uint8_t)bytes[first + i] << 4) >> 4;
        for (int i = low < 0 ? 0 : low; i < n; i++) out[i] = bytes[first + i - half] >> 4;
    }
    }
}

// The scale of a row: integers are followed by a bfloat16.
static inline float scale_of(const uint8_t *row, int format, int width) {
    uint16_t half;
    if (format < INT8) return 1;
    memcpy(&half, row + (format == INT8 ? width : (width + 1) / 2), 2);
    return from_bfloat(half);
}

// x [rows][width] -> out [rows][bytes], integers from -levels to levels and their scale
void row_pack(int format, int levels, int rows, int width, int bytes, const float *x, int8_t *out) {
    int half = (width + 1) / 2;
    for (int row = 0; row < rows; row++, x += width, out += bytes) {
        float most = levels * 1e-30f, scale, sum = 0;
        for (int i = 0; i < width; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most, sum += 0 * x[i];
        if (sum != 0) most = NAN;  // the row contains NaN or infinity: all its numbers become NaN
        scale = most / levels;
        uint32_t whole;
        memcpy(&whole, &scale, 4);
        uint16_t upper = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;  // to nearest, then to even
        memcpy(out + bytes - 2, &upper, 2);
        scale = from_bfloat(upper);
        for (int i = 0; i < width; i++) {
            float near = rintf(x[i] / scale);
            int integer = near > levels ? levels : near >= -levels ? near : -levels;
            if (format == INT8) out[i] = integer;
            else if (i < half) out[i] = integer & 15;
            else out[i - half] |= (unsigned)integer << 4;
        }
    }
}

// row_scores and row_sums read the first `positions` rows of each text, [texts][capacity][bytes]. A row has `groups` kv heads
// of n numbers; `shared` query heads use one kv head.
#define ROWS int format, int texts, int heads, int groups, int n, int positions, int capacity, int bytes

// scores [SIDE] of keys [SIDE][n]
static inline void score(const float *q, const float *keys, int n, const float *scales, float *scores) {
    Lanes sums[SIDE] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int p = 0; p < SIDE; p++) {
            Lanes x, key;
            memcpy(&x, q + i, sizeof x), memcpy(&key, keys + p * n + i, sizeof key);
            sums[p] += x * key;
        }
    for (int p = 0; p < SIDE; p++) {
        float sum = 0;
        for (int j = 0; j < LANES; j++) sum += sums[p][j];
        for (int j = i; j < n; j++) sum += q[j] * keys[p * n + j];
        scores[p] = sum * scales[p];
    }
}

// SIDE rows from position s on, and their scales. Past the end: the last row again, with scale 0.
static inline void rows_at(const uint8_t *text, int format, int width, int s, int positions, int64_t bytes,
                           const uint8_t *rows[SIDE], float *scales) {
    for (int p = 0; p < SIDE; p++) {
        rows[p] = text + least(s + p, positions - 1) * bytes;
        scales[p] = s + p < positions ? scale_of(rows[p], format, width) : 0;
    }
}

// n numbers of each, from number `first` on -> out [SIDE][n]
static void side_by_side(const uint8_t *rows[SIDE], int format, int width, int first, int n, float *out) {
    for (int p = 0; p < SIDE; p++) as_floats(rows[p], format, width, first, n, out + p * n);
}

// q [texts][heads][n] -> scores [texts][heads][positions]
void row_scores(ROWS, const float *q, const uint8_t *keys, float *scores, int threads) {
    int blocks = (positions + BLOCK - 1) / BLOCK, shared = heads / groups;
    #pragma omp parallel for num_threads(threads)
    for (int task = 0; task < texts * blocks; task++) {
        int text = task / blocks, first = task % blocks * BLOCK, end = least(positions, first + BLOCK);
        const uint8_t *rows[SIDE];
        float key[SIDE * WIDEST], scales[SIDE], found[SIDE];
        for (int s = first; s < end; s += SIDE) {
            rows_at(keys + (int64_t)text * capacity * bytes, format, groups * n, s, positions, bytes, rows, scales);
            for (int64_t h = text * heads; h < (text + 1) * heads; h++) {
                int head = h % heads;
                if (head % shared == 0) side_by_side(rows, format, groups * n, head / shared * n, n, key);  // of its kv head
                if (n == 64) score(q + h * n, key, 64, scales, found);
                else score(q + h * n, key, n, scales, found);
                memcpy(scores + h * positions + s, found, sizeof(float) * least(SIDE, end - s));
            }
        }
    }
}

// sums [count] += weights [SIDE] times values [SIDE][count]
static inline void add(const float *values, const float *weights, int count, float *sums) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes even, odd = {0}, value;
        memcpy(&even, sums + i, sizeof even);
        for (int p = 0; p < SIDE; p += 2) {
            memcpy(&value, values + p * count + i, sizeof value), even += weights[p] * value;
            memcpy(&value, values + (p + 1) * count + i, sizeof value), odd += weights[p + 1] * value;
        }
        even += odd;
        memcpy(sums + i, &even, sizeof even);
    }
    for (; i < count; i++)
        for (int p = 0; p < SIDE; p++) sums[i] += weights[p] * values[p * count + i];
}

// weights [texts][heads][positions] -> out [texts][heads][n], the sums of the values
void row_sums(ROWS, const float *weights, const uint8_t *values, float *out, int threads) {
    int shared = heads / groups, pieces = (n + PIECE - 1) / PIECE, all = groups * pieces, parts = least(all, threads);
    memset(out, 0, sizeof(float) * texts * heads * n);
    #pragma omp parallel for num_threads(threads)
    for (int task = 0; task < texts * parts; task++) {
        int text = task / parts, from = task % parts * all / parts, to = (task % parts + 1) * all / parts;
        const uint8_t *rows[SIDE];
        float value[SIDE * PIECE], scales[SIDE], scaled[SIDE];
        for (int s = 0; s < positions; s += SIDE) {
            int there = least(SIDE, positions - s);
            rows_at(values + (int64_t)text * capacity * bytes, format, groups * n, s, positions, bytes, rows, scales);
            for (int piece = from; piece < to; piece++) {
                int group = piece / pieces, first = piece % pieces * PIECE, count = least(PIECE, n - first);
                int64_t head = text * heads + group * shared;
                side_by_side(rows, format, groups * n, group * n + first, count, value);
                for (int64_t h = head; h < head + shared; h++) {
                    for (int p = 0; p < SIDE; p++) scaled[p] = p < there ? scales[p] * weights[h * positions + s + p] : 0;
                    add(value, scaled, count, out + h * n + first);
                }
            }
        }
    }
}

// -- attention over latents of keys (kv_cache/hf_latents.py) ---------------------------------------------------------

// rows [SIDE][r + more] begin with r latents. Writes the rest: products of the latents with weights [r][more].
static void restore(float *rows, int r, int more, const float *weights) {
    for (int t = 0; t < more; t += LANES) {
        Lanes sums[SIDE] = {0};
        for (int i = 0; i < r; i++) {
            Lanes weight;
            memcpy(&weight, weights + i * more + t, sizeof weight);
            for (int p = 0; p < SIDE; p++) sums[p] += rows[p * (r + more) + i] * weight;
        }
        for (int p = 0; p < SIDE; p++) memcpy(rows + p * (r + more) + r + t, sums + p, sizeof(Lanes));
    }
}

// scores [shared][positions] of one position: normalise a head's key if there is a norm [n], rotate it, multiply it by the
// `shared` queries.
static inline void meet(const float *row, const float *bias, int shared, int n, int half, const float *norm, float eps,
                        const float *cos, const float *sin, const float *q, int64_t positions, float *scores) {
    float key[WIDEST];
    for (int i = 0; i < n; i++) key[i] = row[i] + bias[i];
    if (norm) {
        float squares = 0;
        for (int i = 0; i < n; i++) squares += key[i] * key[i];
        for (int i = 0; i < n; i++) key[i] *= norm[i] / sqrtf(squares / n + eps);
    }
    for (int i = 0; i < half; i++) {
        float a = key[i], b = key[i + half];
        key[i] = a * cos[i] - b * sin[i];
        key[i + half] = b * cos[i] + a * sin[i];
    }
    for (int h = 0; h < shared; h++, q += n, scores += positions) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++) sum += q[i] * key[i];
        *scores = sum;
    }
}

// One query of each text, q [texts][heads][n], and latents [texts][capacity][r], the first `positions` -> scores
// [texts][heads][positions]. A row has the latents and then `more` numbers, their products with weights [r][more]. Number i of
// the keys is number at[i] of the row, plus bias[i], [groups n]. norm [n] (or null) and eps normalise each head. The first
// 2 half numbers of a head are rotated by cos and sin [positions][half]. Most at[i] are i, so few numbers are moved.
void latent_scores(int texts, int heads, int groups, int n, int positions, int capacity, int r, int more, int half,
                   const float *latents, const float *q, const int32_t *at, const float *weights, const float *bias,
                   const float *norm, float eps, const float *cos, const float *sin, float *scores, int threads) {
    int blocks = (positions + BLOCK - 1) / BLOCK, shared = heads / groups, width = groups * n, count = 0, moved[width];
    for (int i = 0; i < width; i++)
        if (at[i] != i) moved[count++] = i;
    #pragma omp parallel for num_threads(threads)
    for (int task = 0; task < texts * blocks; task++) {
        int text = task / blocks, first = task % blocks * BLOCK, end = least(positions, first + BLOCK);
        float rows[SIDE * (r + more)], key[width];
        memset(rows, 0, sizeof rows);
        for (int s = first; s < end; s += SIDE) {
            int side = least(SIDE, end - s);
            for (int p = 0; p < side; p++)
                memcpy(rows + p * (r + more), latents + ((int64_t)text * capacity + s + p) * r, sizeof(float) * r);
            restore(rows, r, more, weights);
            for (int p = 0; p < side; p++) {
                const float *row = rows + p * (r + more), *c = cos + (int64_t)(s + p) * half, *d = sin + (int64_t)(s + p) * half;
                memcpy(key, row, sizeof(float) * least(r + more, width));
                for (int i = 0; i < count; i++) key[moved[i]] = row[at[moved[i]]];
                for (int g = 0; g < groups; g++) {
                    int64_t head = (int64_t)text * heads + g * shared;
                    float *out = scores + head * positions + s + p;
                    if (n == 64)
                        meet(key + g * 64, bias + g * 64, shared, 64, half, norm, eps, c, d, q + head * 64, positions, out);
                    else meet(key + g * n, bias + g * n, shared, n, half, norm, eps, c, d, q + head * n, positions, out);
                }
            }
        }
    }
}

#include "trellis.c"
#include "streams.c"  // caches by bits

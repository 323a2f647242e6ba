// The best stream of bits for numbers (bits/trellis.py, kv_cache/bit_streams.py). kernels.c includes it.

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// Number i is best[i >> b]. clang has no such shuffle; with the plain loop gcc's encoder takes four times as long.
static inline Lanes each_repeated(const float *best, int b) {
    Lanes repeated;
#ifdef __clang__
    for (int i = 0; i < LANES; i++) repeated[i] = best[i >> b];
#else
    Places from;
    for (int i = 0; i < LANES; i++) from[i] = i >> b;
    memcpy(&repeated, best, sizeof repeated);
    repeated = __builtin_shuffle(repeated, from);
#endif
    return repeated;
}

// Extends all streams by a window with b new bits, for v numbers. cost [2^window + LANES], in place: the least cost of a stream
// that ends in each window. oldest [2^(window - b)]: the bits that the best stream dropped; up to LANES more are written.
// levels [v][2^window].
static inline void extend(int window, int b, int v, const float *numbers, const float *levels, float *cost, uint8_t *oldest) {
    int kept = 1 << (window - b);
    float best[kept + LANES];
    for (int k = 0; k < kept; k += LANES) {
        Lanes lowest, next;
        Places chosen = {0};
        memcpy(&lowest, cost + k, sizeof lowest);
        for (int high = 1; high < 1 << b; high++) {
            memcpy(&next, cost + high * kept + k, sizeof next);
            Places better = next < lowest;
            chosen = (better & high) | (~better & chosen);
            lowest = (Lanes)((better & (Places)next) | (~better & (Places)lowest));
        }
        memcpy(best + k, &lowest, sizeof lowest);
        Bytes bytes = __builtin_convertvector(chosen, Bytes);
        memcpy(oldest + k, &bytes, sizeof bytes);
    }
    for (int w = 0; w < 1 << window; w += LANES) {
        Lanes sum = each_repeated(best + (w >> b), b), level;
        for (int number = 0; number < v; number++) {
            memcpy(&level, levels + (number << window) + w, sizeof level);
            sum += (numbers[number] - level) * (numbers[number] - level);
        }
        memcpy(cost + w, &sum, sizeof sum);
    }
}

#define EXTEND(window, b, v) case 2 * b + v: extend(window, b, v, numbers, levels, cost, oldest); break;
#define WHOLE_BITS(w) \
    EXTEND(w, 1, 1) EXTEND(w, 2, 1) EXTEND(w, 3, 1) EXTEND(w, 4, 1) EXTEND(w, 5, 1) EXTEND(w, 6, 1) EXTEND(w, 7, 1) EXTEND(w, 8, 1)

// extend() with constant shifts for the compiler. Windows have 12 bits, or 8 bits and then v = 1.
static void extend_by(int window, int b, int v, const float *numbers, const float *levels, float *cost, uint8_t *oldest) {
    if (window == 12) switch (2 * b + v) { WHOLE_BITS(12) EXTEND(12, 1, 2) EXTEND(12, 3, 2) EXTEND(12, 5, 2) EXTEND(12, 7, 2) }
    if (window == 8) switch (2 * b + v) { WHOLE_BITS(8) }
}

static inline int cheapest(int window, const float *cost) {
    int found = 0;
    for (int w = 1; w < 1 << window; w++) found = cost[w] < cost[found] ? w : found;
    return found;
}

// numbers [streams][n v], levels [v][2^window] -> windows [streams][n] of least squared error. oldest [threads][n 2^(window - b)
// + LANES]: scratch memory.
void trellis_write(int streams, int n, int window, int b, int v, const float *numbers, const float *levels, uint8_t *oldest,
                   int64_t *windows, int threads) {
    int64_t kept = 1 << (window - b), size = n * kept + LANES;
    #pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++)
        for (int64_t s = part; s < streams; s += threads) {
            float cost[(1 << window) + LANES];
            memset(cost, 0, sizeof cost);
            for (int64_t t = 0; t < n; t++)
                extend_by(window, b, v, numbers + (s * n + t) * v, levels, cost, oldest + part * size + t * kept);
            int w = cheapest(window, cost);
            for (int64_t t = n - 1; t >= 0; t--) {
                windows[s * n + t] = w;
                w = oldest[part * size + t * kept + (w >> b)] * kept + (w >> b);
            }
        }
}

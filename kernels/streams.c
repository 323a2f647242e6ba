// Loops over caches by bits (kv_cache/bit_streams.py and bit_reader.py). kernels.c includes them. A gain is a token's scale.

enum { CACHE_WINDOW = 8, STATES = 256, GAINS = 16, GAIN_BITS = 4 };  // as in bit_streams.py

// Numbers [count] with bits [count], levels [depth][STATES] -> a row [size]: the stream of least squared error, then the index
// of the gain. A row holds the stream's bytes from last to first, so that two neighbours are one integer. oldest: scratch.
static void write_row(int count, int size, const int32_t *bits, const float *levels, const float *gains, const float *numbers,
                      uint8_t *oldest, uint8_t *row) {
    int gain = 0, end = GAIN_BITS;
    float sum = 0, cost[STATES + LANES];
    for (int i = 0; i < count; i++) sum += numbers[i] * numbers[i], end += bits[i];
    while (gain < GAINS - 1 && sum / count > gains[gain] * gains[gain + 1]) gain++;
    for (int w = 0; w < STATES; w++) cost[w] = w ? 1e30f : 0;
    for (int i = 0; i < count; i++) {
        float number = numbers[i] / gains[gain];
        extend_by(CACHE_WINDOW, bits[i], 1, &number, levels + bits[i] * STATES, cost, oldest + (int64_t)i * STATES);
    }
    int window = cheapest(CACHE_WINDOW, cost);
    memset(row, 0, size);
    for (int i = count, b = GAIN_BITS, value = gain;; value = window & ((1 << b) - 1)) {
        int byte = (end - 1) / 8, placed = value << (8 * byte + 8 - end);
        row[size - 1 - byte] |= placed;
        if (placed >> 8) row[size - byte] |= placed >> 8;
        if (i < count) window = oldest[(int64_t)i * STATES + (window >> b)] << (8 - b) | window >> b;
        end -= b;
        if (!i--) break;
        b = bits[i];
    }
}

// numbers [rows][total] -> packed [rows][stride]: both hold the streams side by side; counts [streams] are their numbers, sizes
// [streams] their bytes. bits [total]; levels [streams][depths][STATES]; oldest [threads][total STATES + LANES]: scratch.
void stream_write(int rows, int streams, int depths, int total, int stride, const int32_t *counts, const int32_t *sizes,
                  const int32_t *bits, const float *levels, const float *gains, const float *numbers, uint8_t *oldest,
                  uint8_t *packed, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++)
        for (int task = part; task < rows * streams; task += threads) {
            int stream = task % streams, number = 0, byte = 0;
            int64_t row = task / streams;
            for (int i = 0; i < stream; i++) number += counts[i], byte += sizes[i];
            if (counts[stream])
                write_row(counts[stream], sizes[stream], bits + number, levels + (int64_t)stream * depths * STATES, gains,
                          numbers + row * total + number, oldest + part * ((int64_t)total * STATES + LANES),
                          packed + row * stride + byte);
        }
}

typedef struct {  // layout of a row's numbers; stride: bytes from one row to the next
    int count, stride, gain_shift;
    const int32_t *places;  // [count][3]: byte of each number, bits below its window there, start of its levels
    const float *levels, *gains;
} Stream;

#define STREAM int count, int stride, int gain_shift, const int32_t *places, const float *levels, const float *gains
#define AS_STREAM {count, stride, gain_shift, places, levels, gains}

static inline int two_bytes(const uint8_t *at) {
    uint16_t x;
    memcpy(&x, at, 2);
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? x : __builtin_bswap16(x);
}

// The numbers of LANES rows, before the gains multiply them: number i of lane p goes to out[i by_number + p by_lane].
static inline void read_lanes(const Stream *stream, const uint8_t *const *rows, float *out, int by_number, int by_lane) {
    const int32_t *place = stream->places;
    for (int i = 0; i < stream->count; i++, place += 3, out += by_number) {
        const float *level = stream->levels + place[2];
        int byte = place[0], shift = place[1];
        for (int p = 0; p < LANES; p++) out[p * by_lane] = level[two_bytes(rows[p] + byte) >> shift & (STATES - 1)];
    }
}

// Addresses and gains of the rows of LANES positions from `first` on. Past the end: the last row again.
static inline Lanes find_lanes(const Stream *stream, const uint8_t *packed, int first, int positions, const uint8_t **rows) {
    Lanes gain;
    for (int p = 0; p < LANES; p++) {
        rows[p] = packed + (int64_t)least(first + p, positions - 1) * stream->stride;
        gain[p] = stream->count ? stream->gains[two_bytes(rows[p]) >> stream->gain_shift & (GAINS - 1)] : 0;
    }
    return gain;
}

// packed [rows][stride] -> out [rows][count]
void stream_read(STREAM, int rows, const uint8_t *packed, float *out, int threads) {
    Stream stream = AS_STREAM;
    #pragma omp parallel for num_threads(threads)
    for (int first = 0; first < rows; first += LANES) {
        const uint8_t *at[LANES];
        float numbers[count * LANES];
        Lanes gain = find_lanes(&stream, packed, first, rows, at);
        read_lanes(&stream, at, numbers, 1, count);
        for (int p = 0; p < least(LANES, rows - first); p++)
            for (int i = 0; i < count; i++) out[((int64_t)first + p) * count + i] = numbers[p * count + i] * gain[p];
    }
}

enum { KEYS = 8 };  // numbers of keys restored together

// out [KEYS][LANES]: numbers `from` to `to` of z [count][LANES] times weights [to - from][KEYS].
static inline void restore_keys(const Lanes *z, int from, int to, const float *weights, Lanes *out) {
    Lanes sums[KEYS] = {0};
    for (int i = from; i < to; i++, weights += KEYS)
        for (int k = 0; k < KEYS; k++) sums[k] += z[i] * weights[k];
    memcpy(out, sums, sizeof sums);
}

// Divides the numbers of a head by their root mean square, times norm [n].
static inline void norm_lanes(Lanes *keys, int n, const float *norm, float eps) {
    Lanes sizes = {0};
    for (int i = 0; i < n; i++) sizes += keys[i] * keys[i];
    for (int p = 0; p < LANES; p++) sizes[p] = 1 / sqrtf(sizes[p] / n + eps);
    for (int i = 0; i < n; i++) keys[i] *= sizes * norm[i];
}

// Rotates pairs of a head's numbers, `half` apart, by cos and sin [half][capacity].
static inline void turn_lanes(Lanes *keys, int half, int capacity, const float *cos, const float *sin) {
    for (int i = 0; i < half; i++, cos += capacity, sin += capacity) {
        Lanes c, d, a = keys[i], b = keys[i + half];
        memcpy(&c, cos, sizeof c);
        memcpy(&d, sin, sizeof d);
        keys[i] = a * c - b * d;
        keys[i + half] = b * c + a * d;
    }
}

// q [heads][n] -> out, scaled and rotated by cos and sin [half][capacity] of one position.
static inline void turn_queries(int heads, int n, int half, int capacity, const float *cos, const float *sin, float scale,
                                const float *q, float *out) {
    for (int i = 0; i < heads * n; i++) out[i] = q[i] * scale;
    for (int h = 0; h < heads; h++, out += n)
        for (int i = 0; i < half; i++) {
            float a = out[i], b = out[i + half], c = cos[(int64_t)i * capacity], d = sin[(int64_t)i * capacity];
            out[i] = a * c - b * d;
            out[i + half] = b * c + a * d;
        }
}

// A head's keys [n] times the `shared` queries -> scores [shared][positions], of at most LANES positions.
static inline void meet_lanes(const Lanes *keys, int shared, int n, const float *q, int here, int64_t positions,
                              float *scores) {
    for (int h = 0; h < shared; h++, q += n, scores += positions) {
        Lanes even = {0}, odd = {0};
        for (int i = 0; i + 1 < n; i += 2) even += keys[i] * q[i], odd += keys[i + 1] * q[i + 1];
        if (n % 2) even += keys[n - 1] * q[n - 1];
        even += odd;
        memcpy(scores, &even, sizeof(float) * here);
    }
}

typedef struct {  // one query for each text, over packed [texts][room][stride], of which the first `positions` are read
    int texts, heads, groups, n, positions, room;
    const int64_t *pads;  // [texts]: padding before each text, or null. Its first WHOLE positions are not quantised
} Batch;

#define BATCH int texts, int heads, int groups, int n, int positions, int room, const int64_t *pads
#define AS_BATCH {texts, heads, groups, n, positions, room, pads}
enum { WHOLE = 4 };

static inline int begin_of(const Batch *batch, int text) { return batch->pads ? batch->pads[text] : 0; }
static inline int end_of_whole(const Batch *batch, int text) { return least(begin_of(batch, text) + WHOLE, batch->positions); }

// q [texts][heads][n], the last of `positions`, before its rotation -> scores [texts][heads][positions]. z are the numbers
// of the stream. Tile t restores KEYS numbers of the keys [groups n]: products of z from ranges[2 t] to ranges[2 t + 1] with
// the next weights. mean [groups n] is added. norm: see meet() in kernels.c. capacity of cos and sin [half][capacity] is a
// multiple of LANES. exact [texts][groups][WHOLE][n]: a text's first keys, rotated.
void stream_scores(STREAM, const int32_t *ranges, const float *weights, const float *mean, BATCH, const float *norm, float eps,
                   int half, int capacity, const float *cos, const float *sin, float scale, const float *q, const float *exact,
                   const uint8_t *packed, float *scores, int threads) {
    Stream stream = AS_STREAM;
    Batch batch = AS_BATCH;
    int blocks = (positions + BLOCK - 1) / BLOCK, width = groups * n, shared = heads / groups;
    int tiles = (width + KEYS - 1) / KEYS;
    #pragma omp parallel for num_threads(threads)
    for (int task = 0; task < texts * blocks; task++) {
        int text = task / blocks, first = task % blocks * BLOCK, end = least(positions, first + BLOCK);
        float query[heads * n];
        const float *c = cos + positions - 1, *d = sin + positions - 1;
        turn_queries(heads, n, half, capacity, c, d, scale, q + (int64_t)text * heads * n, query);
        float *out = scores + (int64_t)text * heads * positions;
        Lanes z[count + 1], keys[tiles * KEYS];
        for (int s = first; s < end; s += LANES) {
            const uint8_t *at[LANES];
            const float *weight = weights;
            Lanes gain = find_lanes(&stream, packed + (int64_t)text * room * stride, s, positions, at);
            read_lanes(&stream, at, (float *)z, LANES, 1);
            for (int t = 0; t < tiles; weight += (ranges[2 * t + 1] - ranges[2 * t]) * KEYS, t++)
                restore_keys(z, ranges[2 * t], ranges[2 * t + 1], weight, keys + t * KEYS);
            for (int i = 0; i < width; i++) keys[i] = keys[i] * gain + mean[i];
            for (int g = 0; g < groups; g++) {
                if (norm) norm_lanes(keys + g * n, n, norm, eps);
                turn_lanes(keys + g * n, half, capacity, cos + s, sin + s);
                meet_lanes(keys + g * n, shared, n, query + g * shared * n, least(LANES, end - s), positions,
                           out + g * shared * (int64_t)positions + s);
            }
        }
        for (int s = begin_of(&batch, text), w = 0; s < end_of_whole(&batch, text); s++, w++)
            for (int h = 0; h < heads && first <= s && s < end; h++) {
                const float *key = exact + (((int64_t)text * groups + h / shared) * WHOLE + w) * n;
                float sum = 0;
                for (int i = 0; i < n; i++) sum += query[h * n + i] * key[i];
                out[(int64_t)h * positions + s] = sum;
            }
    }
}

// sums [heads][wide] of one text: the stream's numbers times weights [heads][positions], over the quantised positions from
// `first` to `end`. wide: count, rounded up to LANES.
static void sum_lanes(const Stream *stream, const Batch *batch, int text, int first, int end, const uint8_t *packed,
                      const float *weights, int wide, float *sums) {
    int heads = batch->heads, from = begin_of(batch, text), to = end_of_whole(batch, text);
    float weight[heads * LANES];
    Lanes rows[wide + 1];
    memset(rows, 0, sizeof rows);
    memset(sums, 0, sizeof(float) * heads * wide);
    for (int s = first; s < end; s += LANES) {
        const uint8_t *at[LANES];
        Lanes gain = find_lanes(stream, packed, s, batch->positions, at);
        read_lanes(stream, at, (float *)rows, 1, wide);
        for (int h = 0; h < heads; h++)
            for (int p = 0; p < LANES; p++) {
                int counts = s + p < end && !(from <= s + p && s + p < to);
                weight[h * LANES + p] = counts ? gain[p] * weights[(int64_t)h * batch->positions + s + p] : 0;
            }
        for (int i = 0; i < wide / LANES; i++)
            for (int h = 0; h < heads; h++) {
                Lanes sum;
                memcpy(&sum, sums + h * wide + i * LANES, sizeof sum);
                for (int p = 0; p < LANES; p++) sum += rows[p * (wide / LANES) + i] * weight[h * LANES + p];
                memcpy(sums + h * wide + i * LANES, &sum, sizeof sum);
            }
    }
}

// weights [texts][heads][positions], which sum to 1 -> out [texts][heads][n]: mean [groups n], plus the sums of the stream's
// numbers times up [groups][count][n], plus the sums over a text's first positions of exact [texts][groups][WHOLE][n], values
// minus the mean. sums [texts + threads][heads][count rounded up to LANES]: scratch memory.
void stream_outputs(STREAM, const float *up, const float *mean, BATCH, const float *weights, const float *exact,
                    const uint8_t *packed, float *sums, float *out, int threads) {
    Stream stream = AS_STREAM;
    Batch batch = AS_BATCH;
    int wide = (count + LANES - 1) / LANES * LANES, shared = heads / groups, parts = (threads + texts - 1) / texts;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (int task = 0; task < texts * parts; task++) {
            int text = task / parts, first = (int64_t)positions * (task % parts) / parts;
            sum_lanes(&stream, &batch, text, first, (int64_t)positions * (task % parts + 1) / parts,
                      packed + (int64_t)text * room * stride, weights + (int64_t)text * heads * positions, wide,
                      sums + (int64_t)task * heads * wide);
        }
        #pragma omp for
        for (int head = 0; head < texts * heads; head++) {
            int text = head / heads, h = head % heads, g = h / shared;
            float *y = out + (int64_t)head * n;
            memcpy(y, mean + g * n, sizeof(float) * n);
            for (int k = 0; k < count; k++) {
                float sum = 0;
                for (int part = 0; part < parts; part++) sum += sums[(((int64_t)text * parts + part) * heads + h) * wide + k];
                for (int i = 0; i < n; i++) y[i] += sum * up[((int64_t)g * count + k) * n + i];
            }
            for (int s = begin_of(&batch, text), w = 0; s < end_of_whole(&batch, text); s++, w++)
                for (int i = 0; i < n; i++)
                    y[i] += weights[(int64_t)head * positions + s] * exact[(((int64_t)text * groups + g) * WHOLE + w) * n + i];
        }
    }
}

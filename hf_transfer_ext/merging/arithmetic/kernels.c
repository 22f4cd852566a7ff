/* The arithmetic of merging in one pass over memory, for tensors on the CPU in float32, bfloat16 or float16.
 *
 * Each function does the same as a few torch functions (named in kernels.py), block by block, so that intermediate
 * results stay in the L1 cache. Sums are computed in the order of the models, and multiply-adds are fused only where
 * written explicitly (-ffp-contract=off), so the result is the same on every machine. Everything is computed in
 * float32, except for scalar products.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* With gcc and glibc, each function is compiled for three generations of x86 and selected at run time. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the flags in `collect` are read as little-endian words; without the kernels torch does their work"
#endif

/* Increase this here and in kernels.py whenever the arguments of a function change. */
#define VERSION 3
#define BLOCK 512
#define MAX_MODELS 32
#define LANES 16
#define BINS 2048
#define TOP 13

/* The dtypes of tensors, in the order of `kernels.DTYPES`. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* A tensor: where its elements are, and their dtype. */
typedef struct {
    const void *data;
    int64_t dtype;
} Tensor;

/* Which elements of a change are kept, see `kernels.Kept`: random if limit < 2**32 - 1. */
typedef struct {
    float low, high, scale;
    uint32_t limit, key, second_key;
} Mask;

int64_t version(void) { return VERSION; }

INLINE float as_float(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint32_t as_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

/* float16 -> float32: shift the exponent; subnormal numbers are normalized by a subtraction. */
INLINE float from_float16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7FFF) << 13, exponent = magnitude & 0x0F800000u;
    uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
    uint32_t tiny = as_bits(as_float(magnitude + (113u << 23)) - as_float(113u << 23));
    uint32_t bits = exponent == 0x0F800000u ? special : exponent == 0 ? tiny : normal;
    return as_float(bits | (uint32_t)(half & 0x8000) << 16);
}

/* float32 -> float16, to the nearest, ties to even; an addition rounds subnormal results. */
INLINE uint16_t to_float16(float number) {
    uint32_t bits = as_bits(number), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    uint32_t tiny = as_bits(as_float(magnitude) + as_float(126u << 23)) - (126u << 23);
    uint32_t large = magnitude > 0x7F800000u ? 0x7E00 : 0x7C00;
    uint32_t half = magnitude >= (143u << 23) ? large : magnitude < (113u << 23) ? tiny : normal;
    return (uint16_t)(half | sign >> 16);
}

/* float32 -> bfloat16, to the nearest, ties to even. */
INLINE uint16_t to_bfloat16(float number) {
    uint32_t bits = as_bits(number), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : rounded);
}

INLINE void load(Tensor tensor, int64_t start, int count, float *restrict out) {
    if (tensor.data == NULL) {
        memset(out, 0, sizeof(float) * count);
    } else if (tensor.dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)tensor.data + start;
        for (int j = 0; j < count; j++) out[j] = as_float((uint32_t)from[j] << 16);
    } else if (tensor.dtype == FLOAT16) {
        const uint16_t *from = (const uint16_t *)tensor.data + start;
        for (int j = 0; j < count; j++) out[j] = from_float16(from[j]);
    } else {
        memcpy(out, (const float *)tensor.data + start, sizeof(float) * count);
    }
}

/* `noise._mix` for one counter: a Weyl sequence, and lowbias32 with the second key between its rounds. */
INLINE uint32_t random_word(uint32_t counter, uint32_t key, uint32_t second_key) {
    uint32_t word = counter * 0x9E3779B1u + key;
    word = (word ^ (word >> 16)) * 0x7FEB352Du;
    word = ((word ^ (word >> 15)) + second_key) * 0x846CA68Bu;
    return word ^ (word >> 16);
}

/* `variance.variance_of`: variance over the models, from the differences to the first. */
INLINE void variance_of(float values[][BLOCK], int models, int count, float *restrict out) {
    float total[BLOCK] = {0}, squares[BLOCK] = {0};
    for (int i = 1; i < models; i++)
        for (int j = 0; j < count; j++) {
            float other = values[i][j] - values[0][j];
            total[j] += other;
            squares[j] += other * other;
        }
    for (int j = 0; j < count; j++) {
        float found = (squares[j] - total[j] * total[j] / models) / models;
        out[j] = found > 0 ? found : 0;
    }
}

INLINE void apply(Mask mask, uint32_t counter, int count, float *restrict change) {
    if (mask.low > 0 || mask.high < INFINITY)
        for (int j = 0; j < count; j++) {
            float magnitude = fabsf(change[j]);
            change[j] = (magnitude >= mask.low) & (magnitude <= mask.high) ? change[j] : 0;
        }
    if (mask.limit < UINT32_MAX)
        for (int j = 0; j < count; j++) {
            uint32_t word = random_word(counter + (uint32_t)j, mask.key, mask.second_key);
            change[j] = word < mask.limit ? change[j] : 0;
        }
    if (mask.scale != 1)
        for (int j = 0; j < count; j++) change[j] *= mask.scale;
}

/* theta_0 + lambda sum_i w_i m_i (theta_i - theta_0).
 *
 * Without `subtract`, the tensors already are the changes. `masks` may be NULL. With `variance` > 0, elements with a
 * smaller variance over the models are 0. With `votes`, only changes count whose vote_i t_i has the sign of
 * sum_i vote_i t_i (plus for 0), and with `normalize`, their sum is divided by that of their w_i.
 */
FOR_EACH_CPU void merge_changes(
    Tensor base, const Tensor *tensors, int64_t models, int64_t subtract, const Mask *masks, uint32_t counter,
    float variance, const float *weights, const float *votes, int64_t normalize, float lambda, int64_t size,
    float *restrict out
) {
    float origin[BLOCK], sum[BLOCK], merged[BLOCK], divisor[BLOCK], values[MAX_MODELS][BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        load(base, start, count, origin);
        for (int i = 0; i < models; i++) load(tensors[i], start, count, values[i]);
        if (variance > 0) variance_of(values, (int)models, count, sum);
        for (int i = 0; i < models && subtract; i++)
            for (int j = 0; j < count; j++) values[i][j] -= origin[j];
        for (int i = 0; i < models && variance > 0; i++)
            for (int j = 0; j < count; j++) values[i][j] = sum[j] >= variance ? values[i][j] : 0;
        if (masks)
            for (int i = 0; i < models; i++) apply(masks[i], counter + (uint32_t)start, count, values[i]);
        for (int j = 0; j < count; j++) merged[j] = 0;
        if (votes == NULL) {
            for (int i = 0; i < models; i++)
                for (int j = 0; j < count; j++) merged[j] = fmaf(weights[i], values[i][j], merged[j]);
        } else {
            for (int j = 0; j < count; j++) sum[j] = divisor[j] = 0;
            for (int i = 0; i < models; i++)
                for (int j = 0; j < count; j++) sum[j] += votes[i] * values[i][j];
            for (int j = 0; j < count; j++) sum[j] = sum[j] >= 0 ? 1 : -1;
            for (int i = 0; i < models; i++) {
                float weight = weights[i], vote = votes[i];
                for (int j = 0; j < count; j++) {
                    float value = values[i][j], agrees = vote * value * sum[j] > 0 ? 1 : 0;
                    merged[j] += agrees * (weight * value);
                    divisor[j] += agrees * weight;
                }
            }
            if (normalize)
                for (int j = 0; j < count; j++) merged[j] /= divisor[j] == 0 ? 1 : divisor[j];
        }
        for (int j = 0; j < count; j++) out[start + j] = origin[j] + lambda * merged[j];
    }
}

/* Index of the first element that is NaN or infinite, or -1. */
FOR_EACH_CPU int64_t first_nonfinite(Tensor tensor, int64_t size) {
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        float values[BLOCK];
        int finite = 0;
        load(tensor, start, count, values);
        for (int j = 0; j < count; j++) finite += fabsf(values[j]) < INFINITY;
        for (int j = 0; finite < count && j < count; j++)
            if (!(fabsf(values[j]) < INFINITY)) return start + j;
    }
    return -1;
}

/* Convert float32 numbers to bfloat16 or float16. */
FOR_EACH_CPU void convert(const float *restrict numbers, int64_t size, int64_t dtype, uint16_t *restrict out) {
    if (dtype == BFLOAT16)
        for (int64_t j = 0; j < size; j++) out[j] = to_bfloat16(numbers[j]);
    else
        for (int64_t j = 0; j < size; j++) out[j] = to_float16(numbers[j]);
}

/* Add the scalar products of all pairs of vectors to the matrix `products`, in float64. */
FOR_EACH_CPU void add_products(const Tensor *tensors, int64_t models, int64_t size, double *products) {
    float values[MAX_MODELS][BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        for (int i = 0; i < models; i++) {
            load(tensors[i], start, count, values[i]);
            for (int j = count; j < BLOCK; j++) values[i][j] = 0;
        }
        for (int i = 0; i < models; i++)
            for (int k = 0; k <= i; k++) {
                double lanes[LANES] = {0}, total = 0;
                for (int first = 0; first < BLOCK; first += LANES)
                    for (int lane = 0; lane < LANES; lane++)
                        lanes[lane] += (double)values[i][first + lane] * values[k][first + lane];
                for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
                products[i * models + k] += total;
                if (k < i) products[k * models + i] += total;
            }
    }
}

/* Collect the numbers between two bounds; `kept` has room for eight more than there are. */
INLINE int collect(const float *numbers, int count, float from, float to, float *kept) {
    uint8_t flags[BLOCK] = {0};
    int end = 0;
    for (int j = 0; j < count; j++) flags[j] = (numbers[j] > from) & (numbers[j] < to);
    for (int first = 0; first < count; first += 8) { /* few are inside: test eight 0/1 flags at once */
        uint64_t eight;
        memcpy(&eight, flags + first, 8);
        for (; eight; eight &= eight - 1) kept[end++] = numbers[first + (__builtin_ctzll(eight) >> 3)];
    }
    return end;
}

/* Count the magnitudes |x_i - base| below, up to and above the edges of brackets, and collect those inside.
 *
 * Every tensor has the same number of brackets; bracket k of tensor i has index `i * brackets + k` in low, high,
 * counts (three numbers each: magnitudes < low, > low and > high), inside and collected (the number in `inside`).
 * positive: for each tensor, the number of magnitudes above 0.
 */
FOR_EACH_CPU void take_magnitudes(
    Tensor base, const Tensor *tensors, int64_t models, int64_t size, int64_t brackets, const float *low,
    const float *high, int64_t *counts, float *const *inside, int64_t *collected, int64_t *positive
) {
    float magnitudes[BLOCK] = {0}, origin[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        load(base, start, count, origin);
        for (int i = 0; i < models; i++) {
            int above_zero = 0;
            load(tensors[i], start, count, magnitudes);
            for (int j = 0; j < count; j++) {
                magnitudes[j] = fabsf(magnitudes[j] - origin[j]);
                above_zero += magnitudes[j] > 0;
            }
            positive[i] += above_zero;
            for (int64_t k = i * brackets; k < (i + 1) * brackets; k++) {
                float from = low[k], to = high[k], *kept = inside[k] + collected[k];
                int below = 0, above_low = 0, above_high = 0;
                for (int j = 0; j < count; j++) {
                    below += magnitudes[j] < from;
                    above_low += magnitudes[j] > from;
                    above_high += magnitudes[j] > to;
                }
                counts[3 * k] += below;
                counts[3 * k + 1] += above_low;
                counts[3 * k + 2] += above_high;
                if (above_low > above_high) collected[k] += collect(magnitudes, count, from, to, kept);
            }
        }
    }
}

/* Order-preserving bits of a number (the bits of negative ones are inverted). -0 becomes 0. */
INLINE uint32_t sortable(float number) {
    uint32_t bits;
    number += 0.0f;
    memcpy(&bits, &number, 4);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* Count words by their leading bits between the least and the greatest; returns the number of ignored bits. */
INLINE int count_words(const uint32_t *words, int64_t size, uint32_t *least, int64_t counts[BINS]) {
    uint32_t low = UINT32_MAX, high = 0, parts[4][BINS] = {{0}};
    int shift = 0;
    for (int64_t j = 0; j < size; j++) {
        low = words[j] < low ? words[j] : low;
        high = words[j] > high ? words[j] : high;
    }
    while ((high - low) >> shift >= BINS) shift++;
    for (int64_t j = 0; j < size; j++) parts[j & 3][(words[j] - low) >> shift]++; /* neighbors are often equal */
    for (int bin = 0; bin < BINS; bin++)
        counts[bin] = (int64_t)parts[0][bin] + parts[1][bin] + parts[2][bin] + parts[3][bin];
    *least = low;
    return shift;
}

/* The numbers at some positions of the sorted sequence, without sorting it; `words` and `spare` have its size. */
FOR_EACH_CPU void values_at(
    const float *numbers, int64_t size, const int64_t *places, int64_t count, uint32_t *words, uint32_t *spare,
    float *out
) {
    int64_t all_counts[BINS], some_counts[BINS];
    uint32_t least_of_all;
    for (int64_t j = 0; j < size; j++) words[j] = sortable(numbers[j]);
    int shift_of_all = count_words(words, size, &least_of_all, all_counts);
    for (int64_t k = 0; k < count; k++) {
        const uint32_t *from = words;
        const int64_t *counts = all_counts;
        int64_t place = places[k], left = size;
        uint32_t least = least_of_all, bin = 0;
        int shift = shift_of_all;
        for (;;) {
            for (bin = 0; place >= counts[bin]; bin++) place -= counts[bin];
            if (shift == 0) break;
            int64_t end = 0, next = counts[bin];
            for (int64_t j = 0; j < left && end < next; j++) {
                uint32_t word = from[j];
                spare[end] = word;
                end += (word - least) >> shift == bin;
            }
            from = spare;
            left = next;
            counts = some_counts;
            shift = count_words(from, left, &least, some_counts);
        }
        uint32_t word = least + bin, bits = word >> 31 ? word & 0x7FFFFFFFu : ~word;
        memcpy(out + k, &bits, 4);
    }
}

/* `variance.variance_of` of a piece. */
FOR_EACH_CPU void variances(const Tensor *tensors, int64_t models, int64_t size, float *restrict out) {
    float values[MAX_MODELS][BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        for (int i = 0; i < models; i++) load(tensors[i], start, count, values[i]);
        variance_of(values, (int)models, count, out + start);
    }
}

/* Per model, add the sum of its squared changes where the variance reaches the threshold to `energies`. */
FOR_EACH_CPU void add_energies(
    Tensor base, const Tensor *tensors, int64_t models, int64_t size, float threshold, double *energies
) {
    float values[MAX_MODELS][BLOCK], origin[BLOCK], variance[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int count = size - start < BLOCK ? (int)(size - start) : BLOCK;
        for (int i = 0; i < models; i++) load(tensors[i], start, count, values[i]);
        load(base, start, count, origin);
        variance_of(values, (int)models, count, variance);
        for (int j = count; j < BLOCK; j++) variance[j] = -1;
        for (int i = 0; i < models; i++) {
            float lanes[LANES] = {0};
            double total = 0;
            for (int first = 0; first < count; first += LANES)
                for (int lane = 0; lane < LANES; lane++) {
                    int j = first + lane;
                    float change = variance[j] >= threshold ? values[i][j] - origin[j] : 0;
                    lanes[lane] += change * change;
                }
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
            energies[i] += total;
        }
    }
}

/* 64-bit words, or 32-bit words if not wide. */
INLINE uint64_t get(const void *words, int wide, int64_t j) {
    return wide ? ((const uint64_t *)words)[j] : ((const uint32_t *)words)[j];
}

INLINE void put(void *words, int wide, int64_t j, uint64_t word) {
    if (wide) ((uint64_t *)words)[j] = word;
    else ((uint32_t *)words)[j] = (uint32_t)word;
}

/* Turn the number of words in each bucket into the bucket's start index. */
INLINE uint32_t begins_of(uint32_t *counts, int64_t first, int64_t last, uint32_t before) {
    for (int64_t bucket = first; bucket <= last; bucket++) {
        uint32_t here = counts[bucket];
        counts[bucket] = before;
        before += here;
    }
    return before;
}

/* Multiply each element of a row by the factor of its rank by magnitude; equal magnitudes are ranked by position.
 *
 * A word consists of the leading bits of the magnitude and, in its last `low` bits, the position. Words are radix
 * sorted, first by the bits after the first TOP ones in `rounds` rounds, then by the first TOP bits; then the rank of
 * an element is known and its word is no longer needed. Differences of bfloat16 numbers have few bits and exponents.
 * So most words are 0 after the first TOP bits, and only the others take part in the first rounds; and most buckets of
 * the last round are empty, so only those from the least to the greatest used one are visited, plus that of 0.
 */
INLINE void scale_by_rank(
    float *restrict row, int64_t columns, const float *factors, int wide, int rounds, int low, void *words,
    void *restrict sorted, void *restrict spare
) {
    uint32_t counts[1 << 11], top_counts[1 << TOP];
    int bits = wide ? 64 : 32, top = bits - TOP, digit = (top - low + rounds - 1) / rounds;
    uint32_t greatest = 0, least = UINT32_MAX; /* range of the used buckets above 0 */
    uint64_t places = ((uint64_t)1 << low) - 1, last_digit = ((uint64_t)1 << digit) - 1;
    for (int64_t j = 0; j < columns; j++) {
        uint32_t magnitude, bucket, before;
        memcpy(&magnitude, row + j, 4);
        magnitude <<= 1;
        bucket = magnitude >> (32 - TOP);
        before = bucket - 1; /* wraps to the largest number for 0 */
        greatest = bucket > greatest ? bucket : greatest;
        least = before < least ? before : least;
        put(words, wide, j, (wide ? (uint64_t)magnitude << 32 : magnitude & ~places) | (uint64_t)j);
    }
    least = least < greatest ? least + 1 : 1;
    for (uint32_t bucket = least; bucket <= greatest; bucket++) top_counts[bucket] = 0;
    top_counts[0] = 0;
    int64_t short_words = 0, long_words = 0;
    for (int64_t j = 0; j < columns; j++) {
        uint64_t word = get(words, wide, j);
        int is_long = (word & (((uint64_t)1 << top) - 1) & ~places) != 0;
        top_counts[word >> top]++;
        put(sorted, wide, short_words, word);
        put(words, wide, long_words, word);
        short_words += !is_long;
        long_words += is_long;
    }
    for (int round = 0; round < rounds && long_words > 0; round++) {
        int shift = low + round * digit, last = round == rounds - 1;
        memset(counts, 0, sizeof counts[0] << digit);
        for (int64_t j = 0; j < long_words; j++) counts[(get(words, wide, j) >> shift) & last_digit]++;
        begins_of(counts, 0, (int64_t)last_digit, last ? (uint32_t)short_words : 0);
        for (int64_t j = 0; j < long_words; j++) {
            uint64_t word = get(words, wide, j);
            put(last ? sorted : spare, wide, counts[(word >> shift) & last_digit]++, word);
        }
        words = spare;
    }
    begins_of(top_counts, least, greatest, begins_of(top_counts, 0, 0, 0));
    for (int64_t j = 0; j < columns; j++) {
        uint64_t word = get(sorted, wide, j);
        row[word & places] *= factors[top_counts[word >> top]++];
    }
}

/* `trimming.drop_by_rank` of the changes x - base, row by row. */
FOR_EACH_CPU void drop_by_rank(
    Tensor base, Tensor tensor, int64_t rows, int64_t columns, int64_t width, int64_t wide, const uint32_t *limits,
    const float *scales, uint32_t counter, uint32_t key, uint32_t second_key, void *words, void *sorted,
    void *spare, float *restrict factors, float *restrict out
) {
    for (int64_t row = 0; row < rows; row++, out += columns) {
        for (int64_t first = 0; first < columns; first += BLOCK) {
            int count = columns - first < BLOCK ? (int)(columns - first) : BLOCK;
            float origin[BLOCK];
            load(tensor, row * columns + first, count, out + first);
            load(base, row * columns + first, count, origin);
            for (int j = 0; j < count; j++) out[first + j] -= origin[j];
        }
        for (int64_t j = 0; j < columns; j++) {
            uint32_t word = random_word(counter + (uint32_t)(row * columns + j), key, second_key);
            factors[j] = word < limits[j] ? scales[j] : 0;
        }
        if (wide) scale_by_rank(out, columns, factors, 1, 2, 32, words, sorted, spare);
        else if (width < 9) scale_by_rank(out, columns, factors, 0, 2, (int)width, words, sorted, spare);
        else scale_by_rank(out, columns, factors, 0, 1, (int)width, words, sorted, spare);
    }
}

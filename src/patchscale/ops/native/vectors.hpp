// Vectors of float32, as wide as the processor's, read from float32 or bfloat16, and matrix products of what fits its
// caches.
//
// Written with the vector extension that GCC and Clang share: the same lines serve every processor. A product keeps a
// tile of the result in registers and reads its left factor a number at a time, by any strides, so that no factor is
// ever turned round or packed.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_VECTORS = 4;
#endif
constexpr int TILE_ROWS = 6;
constexpr long PANEL = 64;  // columns of rows that are multiplied by each other

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef double dvec __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// The upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

static inline vec load(const float* at) {
    return *reinterpret_cast<const vec*>(at);
}
static inline vec load(const bfloat16* at) {
    return reinterpret_cast<vec>(__builtin_convertvector(*reinterpret_cast<const hvec*>(at), uvec) << 16);
}

static inline dvec load(const double* at) {
    return *reinterpret_cast<const dvec*>(at);
}
static inline float load_number(float value) {
    return value;
}
static inline float load_number(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

static inline void store(float* at, vec value) {
    *reinterpret_cast<vec*>(at) = value;
}
// To the nearest, ties to even; NaN stays NaN.
static inline void store(bfloat16* at, vec value) {
    const uvec bits = reinterpret_cast<uvec>(value);
    const uvec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uvec kept = value != value ? bits | 0x400000u : rounded;
    *reinterpret_cast<hvec*>(at) = __builtin_convertvector(kept >> 16, hvec);
}
static inline void store_number(float* at, float value) {
    *at = value;
}
static inline void store_number(bfloat16* at, float value) {
    bfloat16 all[LANES];
    store(all, vec{} + value);
    *at = all[0];
}

// exp(r) 2^power, |r| <= ln(2)/2: the polynomial of Cephes' expf. NaN stays NaN.
static inline vec exp_of_parts(vec r, ivec power) {
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<vec>((power + 127) << 23);
}

static inline vec exp(vec x) {
    x = x < -87.3f ? vec{} - 87.3f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const vec halves = x * 1.44269504088896341f;
    const ivec power = __builtin_convertvector(halves + (halves < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), ivec);
    const vec whole = __builtin_convertvector(power, vec);
    return exp_of_parts(x - whole * 0.693359375f + whole * 2.12194440e-4f, power);
}

// Of a float64, to the last digits of a float32; |x| <= 87.
static inline vec exp(dvec x) {
    const dvec halves = x * 1.44269504088896341;
    const ivec power = __builtin_convertvector(halves + (halves < 0.0 ? dvec{} - 0.5 : dvec{} + 0.5), ivec);
    const dvec whole = __builtin_convertvector(power, dvec);
    return exp_of_parts(__builtin_convertvector(x - whole * 0.693147180559945309, vec), power);
}

static inline vec sigmoid(vec x) {
    return 1.0f / (1.0f + exp(-x));
}

// log(1 + exp(x)) = max(x, 0) + 2 artanh(u / (2 + u)) with u = exp(-|x|), by artanh's series: to the last digits also
// where it is next to nothing.
static inline vec softplus(vec x) {
    const vec u = exp(x < 0.0f ? x : -x), s = u / (2.0f + u), square = s * s;
    vec series = square / 15 + 1.0f / 13;
    series = series * square + 1.0f / 11;
    series = series * square + 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square + 1.0f;
    return (x < 0.0f ? vec{} : x) + 2.0f * s * series;
}

// Elements of a, then of b, by constant places: the one builtin that the two compilers do not share.
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// Sums of neighbours: those of a, then those of b.
static inline vec add_neighbours(vec a, vec b) {
#if defined(__AVX512F__)
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
#endif
}

// The sums of so many vectors, a power of two of them that is no less than LANES, to out.
template <int COUNT>
static inline void sums(const vec* values, float* out) {
    vec left[COUNT];
    for (int i = 0; i < COUNT; i++) left[i] = values[i];
    int count = COUNT;
    for (int width = LANES; width > 1; width /= 2) {
        count /= 2;
        for (int i = 0; i < count; i++) left[i] = add_neighbours(left[2 * i], left[2 * i + 1]);
    }
    for (int i = 0; i < COUNT / LANES; i++) store(out + LANES * i, left[i]);
}

static inline float sum(vec value) {
    for (int width = LANES; width > 1; width /= 2) value = add_neighbours(value, value);
    return value[0];
}

// One product of a sum of products: left by rows and steps at any strides, right by rows of consecutive columns.
struct Factors {
    const float* left;
    long row, step;
    const float* right;
    long pitch;
    long begin, end;  // steps
};

template <int ROWS, int VECTORS>
static inline void tile(
    const Factors* parts, int count, long first_row, long column, float* out, long pitch, bool add
) {
    vec total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = add ? load(out + r * pitch + v * LANES) : vec{};
    for (int part = 0; part < count; part++) {
        const Factors f = parts[part];
        const float* left = f.left + first_row * f.row + f.begin * f.step;
        const float* right = f.right + f.begin * f.pitch + column;
        for (long i = f.begin; i < f.end; i++, left += f.step, right += f.pitch) {
            vec row[VECTORS];
            for (int v = 0; v < VECTORS; v++) row[v] = load(right + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                const float number = left[r * f.row];
                for (int v = 0; v < VECTORS; v++) total[r][v] += number * row[v];
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * pitch + v * LANES, total[r][v]);
}

template <int ROWS>
static void strips(const Factors* parts, int count, long first_row, long columns, float* out, long pitch, bool add) {
    long c = 0;
    for (; c + TILE_VECTORS * LANES <= columns; c += TILE_VECTORS * LANES)
        tile<ROWS, TILE_VECTORS>(parts, count, first_row, c, out + c, pitch, add);
    for (; c < columns; c += LANES) tile<ROWS, 1>(parts, count, first_row, c, out + c, pitch, add);
}

// Which steps of the last product matter to a row: all, those up to it, or those from it on.
enum class Steps { all, up_to_row, from_row };

// out = sum of products (added to what is there, with add); columns is a multiple of 16.
static void product(
    long rows, long columns, const Factors* parts, int count, Steps steps, float* out, long pitch, bool add = false
) {
    Factors own[2];
    for (int part = 0; part < count; part++) own[part] = parts[part];
    Factors& last = own[count - 1];
    const long end = last.end;
    for (long r = 0; r < rows; r += TILE_ROWS) {
        const long left = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        if (steps == Steps::up_to_row) last.end = r + left < end ? r + left : end;
        if (steps == Steps::from_row) last.begin = r;
        float* to = out + r * pitch;
        switch (left) {
            case 1:
                strips<1>(own, count, r, columns, to, pitch, add);
                break;
            case 2:
                strips<2>(own, count, r, columns, to, pitch, add);
                break;
            case 3:
                strips<3>(own, count, r, columns, to, pitch, add);
                break;
            case 4:
                strips<4>(own, count, r, columns, to, pitch, add);
                break;
            case 5:
                strips<5>(own, count, r, columns, to, pitch, add);
                break;
            default:
                strips<TILE_ROWS>(own, count, r, columns, to, pitch, add);
        }
    }
}

// out[i][j] += the sum over panels of a[i] . b[j]: four rows of each, [panel][row][64].
static void multiply_rows(
    long panels, const float* a, long a_panel, const float* b, long b_panel, float* out, long pitch
) {
    vec total[16];
    for (int i = 0; i < 16; i++) total[i] = vec{};
    for (long panel = 0; panel < panels; panel++, a += a_panel, b += b_panel)
        for (long c = 0; c < PANEL; c += LANES) {
            vec right[4];
            for (int j = 0; j < 4; j++) right[j] = load(b + j * PANEL + c);
            for (int i = 0; i < 4; i++) {
                const vec left = load(a + i * PANEL + c);
                for (int j = 0; j < 4; j++) total[4 * i + j] += left * right[j];
            }
        }
    float found[16];
    sums<16>(total, found);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) out[i * pitch + j] += found[4 * i + j];
}

// A Mamba-2 mixer between its two projections, or its scan alone, in float32: forward and backward.
//
// A sample goes through chunk by chunk, in scan order; whatever a chunk leaves for the next step of the work stays in
// the cache. Tokens of a chunk are kept in scan order: only reading and writing the caller's tensors knows where they
// stand. The mathematics and the names are those of chunked.py:
//
//     Y = exp(cs - c) * ([C | M] @ [G; X'])     with M = C B^T, masked, and X' = exp(c - cs) dt x
//     S = G + B^T X'
//     G' = exp(...) S                           of the next chunk
//
// All channels of x, head after head, are cut into panels of 64 columns: there are a multiple of 64. A panel of rows, [row][64], is what products
// read and write: it fits the innermost cache, and a head is never cut. Threads share the samples, or, where these are
// fewer, the channels, panels and tokens of a chunk.

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vectors.hpp"

namespace {

constexpr long PANEL = 64;
constexpr long GROUP = 8;  // panels, at most, whose rows are multiplied by each other at a time

// The caller's (batch, length, channels), and one chunk of it by scan order; channels are consecutive.
struct Tensor3 {
    float* at;
    int64_t batch, row;
};

struct Rows {
    float* at;
    long row;
    float* operator[](long i) const { return at + i * row; }
};

}  // namespace

// What a call reads and writes; native/mixer.py fills it, field by field. A pointer may be null where that is said.
struct Call {
    int64_t batch, length, body, reverse, heads, headdim, d_state, taps, chunks, longest, threads;
    int64_t has_initial, has_final;  // whether a state enters, and whether one leaves (or its gradient comes back)
    double eps;
    const int64_t *starts, *numbers;  // of chunks in scan order: first place, and where it stands among them
    Tensor3 x, B, C, z;  // x: x, B and C as they enter the convolution, if there is one; z: null without a gate
    const float *conv_weight, *conv_bias, *history;  // (taps, conv_dim), (conv_dim,), (batch, taps - 1, conv_dim)
    const float *D, *norm_weight;                    // (width,), one number for each channel
    const float *read, *write_dt;                    // (batch, length, heads)
    const float *enter, *enter_rest;                 // (batch, chunks + 1, heads); the second may be null
    float* state;                                    // (batch, panels, d_state, 64): S, or the gradient of G
    float* states;                                   // (batch, chunks, panels, d_state, 64): G; null if not kept
    Tensor3 y, out;                                  // y: null if not kept
    // The backward's
    const float* final_state;  // like state: H after the last chunk
    Tensor3 dout, dz, dx, dB, dC;
    float *along_x, *along_y, *along_states;  // (batch, length, heads) twice, (batch, chunks, heads)
    // For each worker: of conv_weight, conv_bias, norm_weight, D; and of the history
    float *dconv_weight, *dconv_bias, *dnorm_weight, *dD, *dhistory;
    float* scratch;
};

namespace {

struct Sizes {
    long width, n, conv_dim, panels, pitch, rows;

    explicit Sizes(const Call& p)
        : width(p.heads * p.headdim), n(p.d_state), conv_dim(width + 2 * n), panels(width / PANEL),
          pitch((p.longest + 15) / 16 * 16), rows(pitch) {}
    long state() const { return panels * n * PANEL; }
};

// Memory of the threads that work on a sample together, and of each of them.
struct Shared {
    float *act, *slope, *dact, *y, *dy, *carry;
};
struct Own {
    float *B_turned, *M, *G, *written, *product, *line;
    float *read, *dS, *dM, *dB, *dC;
};

struct Arena {
    float* at;
    long used = 0;
    float* take(long count) {
        float* taken = at ? at + used : nullptr;
        used += (count + 15) / 16 * 16;
        return taken;
    }
};

Shared take_shared(Arena& arena, const Call& p, bool backward) {
    const Sizes s(p);
    Shared m{};
    m.act = arena.take(s.rows * s.conv_dim);
    if (backward) {
        m.slope = arena.take(s.rows * s.conv_dim);
        m.dact = arena.take(s.rows * s.conv_dim);
        m.dy = arena.take(s.rows * s.width);
        m.carry = arena.take(std::max<long>(p.taps - 1, 0) * s.conv_dim);
    } else {
        m.y = arena.take(s.rows * s.width);
    }
    return m;
}

Own take_own(Arena& arena, const Call& p, bool backward) {
    const Sizes s(p);
    const long panels = backward ? GROUP : 1;
    Own m{};
    m.B_turned = arena.take(s.n * s.pitch);
    m.M = arena.take(s.rows * s.pitch);
    m.G = arena.take(s.n * PANEL);
    m.written = arena.take(panels * s.rows * PANEL);
    m.product = arena.take(s.rows * PANEL);
    m.line = arena.take(3 * s.width);
    if (backward) {
        m.read = arena.take(panels * s.rows * PANEL);
        m.dS = arena.take(panels * s.n * PANEL);
        m.dM = arena.take(s.rows * s.pitch);
        m.dB = arena.take(s.rows * s.n);
        m.dC = arena.take(s.rows * s.n);
    }
    return m;
}

// One of the threads that work on a sample together.
struct Worker {
    long rank, size;  // among them
    long number;      // among all
    Shared shared;
    const Own* owns;  // of all of them

    const Own& own() const { return owns[rank]; }
    // Its share of so many things, in equal parts.
    long first(long count) const { return count * rank / size; }
    long last(long count) const { return count * (rank + 1) / size; }
    void meet() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

struct Chunk {
    long sample, start, size, number, token, step;

    Chunk(const Call& p, long sample, long i)
        : sample(sample), start(p.starts[i]), size(p.starts[i + 1] - p.starts[i]), number(p.numbers[i]) {
        const bool from_right = p.reverse && start < p.body;
        token = from_right ? p.body - 1 - start : start;
        step = from_right ? -1 : 1;
    }
    Rows rows(const Tensor3& t) const { return {t.at + sample * t.batch + token * t.row, step * t.row}; }
    Rows heads(const Call& p, const float* values) const {
        return {const_cast<float*>(values) + (sample * p.length + token) * p.heads, step * long(p.heads)};
    }
};

const float* enter_factors(const Call& p, const float* factors, long sample, long number) {
    return factors + (sample * (p.chunks + 1) + number) * p.heads;
}

// to = from, times what is left of it on the way into the chunk of that number; [d_state][64] of one panel.
void enter(const Call& p, long sample, long number, long panel, const float* from, float* to) {
    const Sizes s(p);
    for (long c = 0; c < PANEL; c += 16) {
        const long head = (PANEL * panel + c) / p.headdim;
        const float factor = enter_factors(p, p.enter, sample, number)[head];
        const float rest = p.enter_rest ? enter_factors(p, p.enter_rest, sample, number)[head] : 1.0f;
        for (long i = 0; i < s.n; i++)
            for (long v = c; v < c + 16; v += LANES) store(to + i * PANEL + v, load(from + i * PANEL + v) * factor * rest);
    }
}

// A token by its place in the scan, before the convolution; places before the first are the history's.
const float* entering(const Call& p, const Sizes& s, long sample, long place) {
    if (place < 0) return p.history + (sample * (p.taps - 1) + p.taps - 1 + place) * s.conv_dim;
    const long token = p.reverse && place < p.body ? p.body - 1 - place : place;
    return p.x.at + sample * p.x.batch + token * p.x.row;
}

// SiLU of the convolution, and its slope if slope is not null: channels from..to of a chunk.
template <int TAPS>
void convolve(const Call& p, const Chunk& chunk, long from, long to, float* act, float* slope) {
    const Sizes s(p);
    for (long t = 0; t < chunk.size; t++) {
        const float* rows[TAPS];
        for (int k = 0; k < TAPS; k++) rows[k] = entering(p, s, chunk.sample, chunk.start + t + k - (TAPS - 1));
        for (long c = from; c < to; c += LANES) {
            vec pre = load(p.conv_bias + c);
            for (int k = 0; k < TAPS; k++) pre += load(p.conv_weight + k * s.conv_dim + c) * load(rows[k] + c);
            const vec gate = sigmoid(pre);
            store(act + t * s.conv_dim + c, pre * gate);
            if (slope) store(slope + t * s.conv_dim + c, gate * (1.0f + pre * (1.0f - gate)));
        }
    }
}

// x, B and C of a chunk side by side, as the scan reads them.
void prepare(const Call& p, const Chunk& chunk, const Worker& w, bool backward) {
    const Sizes s(p);
    float *act = w.shared.act, *slope = backward ? w.shared.slope : nullptr;
    const long from = 16 * w.first(s.conv_dim / 16), to = 16 * w.last(s.conv_dim / 16);
    switch (p.taps) {
        case 1: convolve<1>(p, chunk, from, to, act, slope); break;
        case 2: convolve<2>(p, chunk, from, to, act, slope); break;
        case 3: convolve<3>(p, chunk, from, to, act, slope); break;
        case 4: convolve<4>(p, chunk, from, to, act, slope); break;
        default: {
            const Rows x = chunk.rows(p.x), B = chunk.rows(p.B), C = chunk.rows(p.C);
            for (long t = w.first(chunk.size); t < w.last(chunk.size); t++) {
                float* row = act + t * s.conv_dim;
                std::memcpy(row, x[t], sizeof(float) * s.width);
                std::memcpy(row + s.width, B[t], sizeof(float) * s.n);
                std::memcpy(row + s.width + s.n, C[t], sizeof(float) * s.n);
            }
        }
    }
}

// M = C B^T, 0 where s comes after t; every thread has its own, which costs less than to wait for another's.
void multiply_tokens(const Call& p, const Chunk& chunk, const Worker& w) {
    const Sizes s(p);
    const float *B = w.shared.act + s.width, *C = B + s.n;
    float *turned = w.own().B_turned, *M = w.own().M;
    for (long i = 0; i < s.n; i++) {
        for (long t = 0; t < chunk.size; t++) turned[i * s.pitch + t] = B[t * s.conv_dim + i];
        for (long t = chunk.size; t < s.pitch; t++) turned[i * s.pitch + t] = 0;
    }
    const Factors parts[] = {{C, s.conv_dim, 1, turned, s.pitch, 0, s.n}};
    product(chunk.size, s.pitch, parts, 1, Steps::all, M, s.pitch);
    for (long t = 0; t < chunk.size; t++)
        for (long later = t + 1; later < chunk.size; later++) M[t * s.pitch + later] = 0;
}

// to = factor * from for a panel of a chunk: factors by token and head, to by rows of 64.
void scale_panel(
    const Call& p, long panel, long rows, const Rows& factors, const float* from, long from_row, float* to,
    long to_row
) {
    for (long t = 0; t < rows; t++)
        for (long c = 0; c < PANEL; c += 16) {
            const float factor = factors[t][(PANEL * panel + c) / p.headdim];
            for (long v = c; v < c + 16; v += LANES) store(to + t * to_row + v, load(from + t * from_row + v) * factor);
        }
}

void scan_chunk(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y, bool reads, bool passes) {
    const Sizes s(p);
    const Own& own = w.own();
    const float *act = w.shared.act, *B = act + s.width, *C = B + s.n;
    for (long panel = w.first(s.panels); panel < w.last(s.panels); panel++) {
        float* state = p.state ? p.state + (chunk.sample * s.panels + panel) * s.n * PANEL : nullptr;
        float* G = own.G;
        if (p.states) G = p.states + ((chunk.sample * p.chunks + chunk.number) * s.panels + panel) * s.n * PANEL;
        if (reads) enter(p, chunk.sample, chunk.number, panel, state, G);
        scale_panel(
            p, panel, chunk.size, chunk.heads(p, p.write_dt), act + PANEL * panel, s.conv_dim, own.written, PANEL
        );
        const Factors with_states = {C, s.conv_dim, 1, G, PANEL, 0, s.n};
        const Factors with_tokens = {own.M, s.pitch, 1, own.written, PANEL, 0, chunk.size};
        const Factors parts[] = {reads ? with_states : with_tokens, with_tokens};
        product(chunk.size, PANEL, parts, reads ? 2 : 1, Steps::up_to_row, own.product, PANEL);
        scale_panel(
            p, panel, chunk.size, chunk.heads(p, p.read), own.product, PANEL, y.at + PANEL * panel, y.row
        );
        if (passes) {
            if (reads) std::memcpy(state, G, sizeof(float) * s.n * PANEL);
            const Factors entering[] = {{B, 1, s.conv_dim, own.written, PANEL, 0, chunk.size}};
            product(s.n, PANEL, entering, 1, Steps::all, state, PANEL, reads);
        }
    }
}

// Gate and norm of a chunk: out = norm_weight * g / rms(g) with g = (y + D x) silu(z).
void gate(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y) {
    const Sizes s(p);
    const Rows z = chunk.rows(p.z), out = chunk.rows(p.out);
    float* gated = w.own().line;
    for (long t = w.first(chunk.size); t < w.last(chunk.size); t++) {
        const float* x = w.shared.act + t * s.conv_dim;
        vec squares = {};
        for (long c = 0; c < s.width; c += LANES) {
            const vec entered = load(z[t] + c);
            const vec g = (load(y[t] + c) + load(p.D + c) * load(x + c)) * entered * sigmoid(entered);
            store(gated + c, g);
            squares += g * g;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / s.width + float(p.eps));
        for (long c = 0; c < s.width; c += LANES)
            store(out[t] + c, load(gated + c) * scale * load(p.norm_weight + c));
    }
}

void forward_sample(const Call& p, long sample, const Worker& w) {
    const Sizes s(p);
    for (long i = 0; i < p.chunks; i++) {
        const Chunk chunk(p, sample, i);
        const Rows y = p.y.at ? chunk.rows(p.y) : Rows{w.shared.y, s.width};
        prepare(p, chunk, w, false);
        w.meet();
        multiply_tokens(p, chunk, w);
        scan_chunk(p, chunk, w, y, i > 0 || p.has_initial, i + 1 < p.chunks || p.has_final);
        w.meet();
        if (p.z.at) gate(p, chunk, w, y);
        w.meet();
    }
}

// The gradients of z, of y + D x (to shared dy) and of norm_weight.
void gate_backward(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y) {
    const Sizes s(p);
    const Rows z = chunk.rows(p.z), dout = chunk.rows(p.dout), dz = chunk.rows(p.dz);
    float *skipped = w.own().line, *gates = skipped + s.width, *dnorm = p.dnorm_weight + w.number * s.width;
    for (long t = w.first(chunk.size); t < w.last(chunk.size); t++) {
        const float* x = w.shared.act + t * s.conv_dim;
        float* dy = w.shared.dy + t * s.width;
        vec squares = {}, along = {};
        for (long c = 0; c < s.width; c += LANES) {
            const vec entered = load(z[t] + c), sig = sigmoid(entered);
            const vec skip = load(y[t] + c) + load(p.D + c) * load(x + c);
            const vec g = skip * entered * sig;
            store(skipped + c, skip);
            store(gates + c, sig);
            squares += g * g;
            along += g * load(dout[t] + c) * load(p.norm_weight + c);
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / s.width + float(p.eps));
        const float back = -sum(along) * scale * scale * scale / s.width;
        for (long c = 0; c < s.width; c += LANES) {
            const vec entered = load(z[t] + c), sig = load(gates + c), skip = load(skipped + c), d = load(dout[t] + c);
            const vec silu = entered * sig, g = skip * silu;
            const vec dgated = d * load(p.norm_weight + c) * scale + g * back;
            store(dnorm + c, load(dnorm + c) + d * g * scale);
            store(dz[t] + c, dgated * skip * sig * (1.0f + entered * (1.0f - sig)));
            store(dy + c, dgated * silu);
        }
    }
}

// out[i][j] += the sum over panels of a[i] . b[j]: four rows of each, [panel][row][64].
void multiply_rows(
    const Sizes& s, long first_panel, long last_panel, const float* a, long a_panel, const float* b, long b_panel,
    float* out, long pitch
) {
    vec total[16];
    for (int i = 0; i < 16; i++) total[i] = vec{};
    for (long panel = first_panel; panel < last_panel; panel++, a += a_panel, b += b_panel)
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

// A group of panels, back through a chunk: gradients of x and of G, and this group's part of those of B, C and M.
void scan_panels_backward(
    const Call& p, const Chunk& chunk, const Chunk* next, const Worker& w, const Rows& y, const Rows& dy, bool reads,
    long first_panel, long last_panel
) {
    const Sizes s(p);
    const Own& own = w.own();
    const float *act = w.shared.act, *B = act + s.width, *C = B + s.n;
    const long rows = (chunk.size + 3) / 4 * 4, rows_panel = s.rows * PANEL, state_panel = s.n * PANEL;
    const Rows read = chunk.heads(p, p.read), write_dt = chunk.heads(p, p.write_dt);
    const Rows along_x = chunk.heads(p, p.along_x), along_y = chunk.heads(p, p.along_y);
    const bool passes = next || p.has_final;
    const long following = next ? next->number : p.chunks;
    auto states_of = [&](long number, long panel) {
        return p.states + ((chunk.sample * p.chunks + number) * s.panels + panel) * state_panel;
    };
    for (long panel = first_panel; panel < last_panel; panel++) {
        const long place = panel - first_panel;
        float *written = own.written + place * rows_panel, *dP = own.read + place * rows_panel;
        float *dS = own.dS + place * state_panel;
        const float *x = act + PANEL * panel, *dy_panel = dy.at + PANEL * panel, *y_panel = y.at + PANEL * panel;
        float* dG = p.state ? p.state + (chunk.sample * s.panels + panel) * state_panel : nullptr;
        scale_panel(p, panel, chunk.size, write_dt, x, s.conv_dim, written, PANEL);
        scale_panel(p, panel, chunk.size, read, dy_panel, dy.row, dP, PANEL);
        for (long t = chunk.size; t < rows; t++) {
            std::memset(written + t * PANEL, 0, sizeof(float) * PANEL);
            std::memset(dP + t * PANEL, 0, sizeof(float) * PANEL);
        }
        if (passes) {
            const long kept = (chunk.sample * s.panels + panel) * state_panel;
            const float* G_next = next ? states_of(following, panel) : p.final_state + kept;
            float* along = p.along_states + (chunk.sample * p.chunks + chunk.number) * p.heads;
            for (long c = 0; c < PANEL; c += 16) {
                vec total = {};
                for (long i = 0; i < s.n; i++)
                    for (long v = c; v < c + 16; v += LANES) total += load(dG + i * PANEL + v) * load(G_next + i * PANEL + v);
                along[(PANEL * panel + c) / p.headdim] += sum(total);
            }
            enter(p, chunk.sample, following, panel, dG, dS);
        }
        if (reads) {
            if (passes) std::memcpy(dG, dS, sizeof(float) * state_panel);
            const Factors leaving[] = {{C, 1, s.conv_dim, dP, PANEL, 0, chunk.size}};
            product(s.n, PANEL, leaving, 1, Steps::all, dG, PANEL, passes);
        }
        // dX' = [B | M^T] [dS; dP]
        const Factors with_states = {B, s.conv_dim, 1, dS, PANEL, 0, s.n};
        const Factors with_tokens = {own.M, 1, s.pitch, dP, PANEL, 0, chunk.size};
        const Factors parts[] = {passes ? with_states : with_tokens, with_tokens};
        product(chunk.size, PANEL, parts, passes ? 2 : 1, Steps::from_row, own.product, PANEL);
        for (long t = 0; t < chunk.size; t++) {
            const float *dwritten = own.product + t * PANEL, *x_t = x + t * s.conv_dim, *dy_t = dy_panel + t * dy.row;
            const float* y_t = y_panel + t * y.row;
            float* dx = w.shared.dact + t * s.conv_dim + PANEL * panel;
            for (long c = 0; c < PANEL; c += p.headdim) {
                const long head = (PANEL * panel + c) / p.headdim;
                vec with_x = {}, with_y = {};
                for (long v = c; v < c + p.headdim; v += LANES) {
                    const vec d = load(dwritten + v);
                    with_x += d * load(x_t + v);
                    with_y += load(dy_t + v) * load(y_t + v);
                    store(dx + v, d * write_dt[t][head]);
                }
                along_x[t][head] = sum(with_x);
                along_y[t][head] = sum(with_y);
            }
            if (p.D) {
                float* dD = p.dD + w.number * s.width + PANEL * panel;
                for (long c = 0; c < PANEL; c += LANES) {
                    const vec d = load(dy_t + c);
                    store(dx + c, load(dx + c) + d * load(p.D + PANEL * panel + c));
                    store(dD + c, load(dD + c) + d * load(x_t + c));
                }
            }
        }
    }
    // dM = dP X'^T, dC = dP G^T and dB = X' dS^T, summed over all channels.
    for (long i = 0; i < rows; i += 4) {
        const float *dP = own.read + i * PANEL, *written = own.written + i * PANEL;
        for (long j = 0; j <= i; j += 4)
            multiply_rows(
                s, first_panel, last_panel, dP, rows_panel, own.written + j * PANEL, rows_panel, own.dM + i * s.pitch + j,
                s.pitch
            );
        for (long j = 0; j < s.n; j += 4) {
            if (reads)
                multiply_rows(
                    s, first_panel, last_panel, dP, rows_panel, states_of(chunk.number, first_panel) + j * PANEL,
                    state_panel, own.dC + i * s.n + j, s.n
                );
            if (passes)
                multiply_rows(
                    s, first_panel, last_panel, written, rows_panel, own.dS + j * PANEL, state_panel,
                    own.dB + i * s.n + j, s.n
                );
        }
    }
}

void scan_chunk_backward(
    const Call& p, const Chunk& chunk, const Chunk* next, const Worker& w, const Rows& y, const Rows& dy, bool reads
) {
    const Sizes s(p);
    const Own& own = w.own();
    std::memset(own.dM, 0, sizeof(float) * s.rows * s.pitch);
    std::memset(own.dB, 0, sizeof(float) * s.rows * s.n);
    std::memset(own.dC, 0, sizeof(float) * s.rows * s.n);
    const long rounds = (s.panels + GROUP * w.size - 1) / (GROUP * w.size), groups = rounds * w.size;
    for (long g = w.rank * rounds; g < (w.rank + 1) * rounds; g++)
        scan_panels_backward(
            p, chunk, next, w, y, dy, reads, s.panels * g / groups, s.panels * (g + 1) / groups
        );
}

// The gradients of B and C of a chunk, from all threads' parts of them and of M.
void finish_B_and_C(const Call& p, const Chunk& chunk, const Worker& w) {
    const Sizes s(p);
    const float *B = w.shared.act + s.width, *C = B + s.n;
    float *dB = w.shared.dact + s.width, *dC = dB + s.n, *dM = w.own().dM;
    for (long t = 0; t < chunk.size; t++) {
        for (long i = 0; i < s.n; i++) {
            dB[t * s.conv_dim + i] = dC[t * s.conv_dim + i] = 0;
            for (long rank = 0; rank < w.size; rank++) {
                dB[t * s.conv_dim + i] += w.owns[rank].dB[t * s.n + i];
                dC[t * s.conv_dim + i] += w.owns[rank].dC[t * s.n + i];
            }
        }
        for (long rank = 0; rank < w.size; rank++)
            if (rank != w.rank)
                for (long i = 0; i <= t; i++) dM[t * s.pitch + i] += w.owns[rank].dM[t * s.pitch + i];
        for (long i = t + 1; i < chunk.size; i++) dM[t * s.pitch + i] = 0;
    }
    const Factors to_C[] = {{dM, s.pitch, 1, B, s.conv_dim, 0, chunk.size}};
    product(chunk.size, s.n, to_C, 1, Steps::up_to_row, dC, s.conv_dim, true);
    const Factors to_B[] = {{dM, 1, s.pitch, C, s.conv_dim, 0, chunk.size}};
    product(chunk.size, s.n, to_B, 1, Steps::from_row, dB, s.conv_dim, true);
}

// Back through the convolution: channels from..to of a chunk. The carry holds the gradients before the SiLU of the
// tokens that follow the chunk, as many as the convolution looks back.
template <int TAPS>
void convolve_backward(const Call& p, const Chunk& chunk, const Worker& w, long from, long to) {
    const Sizes s(p);
    const Rows dx = chunk.rows(p.dx);
    float *dpre = w.shared.dact, *carry = w.shared.carry;
    float* dtaps = p.dconv_weight + w.number * TAPS * s.conv_dim;
    float* dbias = p.dconv_bias + w.number * s.conv_dim;
    for (long t = 0; t < chunk.size; t++) {
        const float* rows[TAPS];
        for (int k = 0; k < TAPS; k++) rows[k] = entering(p, s, chunk.sample, chunk.start + t + k - (TAPS - 1));
        float *d = dpre + t * s.conv_dim, *slope = w.shared.slope + t * s.conv_dim;
        for (long c = from; c < to; c += LANES) {
            const vec value = load(d + c) * load(slope + c);
            store(d + c, value);
            store(dbias + c, load(dbias + c) + value);
            for (int k = 0; k < TAPS; k++) {
                float* tap = dtaps + k * s.conv_dim + c;
                store(tap, load(tap) + value * load(rows[k] + c));
            }
        }
    }
    auto dpre_at = [&](long t) { return t < chunk.size ? dpre + t * s.conv_dim : carry + (t - chunk.size) * s.conv_dim; };
    for (long t = 0; t < chunk.size; t++) {
        const float* rows[TAPS];
        for (int k = 0; k < TAPS; k++) rows[k] = dpre_at(t + TAPS - 1 - k);
        for (long c = from; c < to; c += LANES) {
            vec total = {};
            for (int k = 0; k < TAPS; k++) total += load(p.conv_weight + k * s.conv_dim + c) * load(rows[k] + c);
            store(dx[t] + c, total);
        }
    }
    for (long j = TAPS - 2; j >= 0; j--)
        std::memcpy(carry + j * s.conv_dim + from, dpre_at(j) + from, sizeof(float) * (to - from));
    if (chunk.start == 0)
        for (long j = 0; j < TAPS - 1; j++)
            for (long c = from; c < to; c += LANES) {
                vec total = {};
                for (int k = 0; k <= j; k++)
                    total += load(p.conv_weight + k * s.conv_dim + c) * load(carry + (j - k) * s.conv_dim + c);
                store(p.dhistory + (chunk.sample * (TAPS - 1) + j) * s.conv_dim + c, total);
            }
}

// From the gradients of what the scan reads to those of what was given.
void give_back(const Call& p, const Chunk& chunk, const Worker& w) {
    const Sizes s(p);
    const long from = 16 * w.first(s.conv_dim / 16), to = 16 * w.last(s.conv_dim / 16);
    switch (p.taps) {
        case 1: convolve_backward<1>(p, chunk, w, from, to); break;
        case 2: convolve_backward<2>(p, chunk, w, from, to); break;
        case 3: convolve_backward<3>(p, chunk, w, from, to); break;
        case 4: convolve_backward<4>(p, chunk, w, from, to); break;
        default: {
            const Rows dx = chunk.rows(p.dx), dB = chunk.rows(p.dB), dC = chunk.rows(p.dC);
            for (long t = w.first(chunk.size); t < w.last(chunk.size); t++) {
                const float* row = w.shared.dact + t * s.conv_dim;
                std::memcpy(dx[t], row, sizeof(float) * s.width);
                std::memcpy(dB[t], row + s.width, sizeof(float) * s.n);
                std::memcpy(dC[t], row + s.width + s.n, sizeof(float) * s.n);
            }
        }
    }
}

void backward_sample(const Call& p, long sample, const Worker& w) {
    const Sizes s(p);
    const long carried = std::max<long>(p.taps - 1, 0) * s.conv_dim;
    if (w.rank == 0) std::memset(w.shared.carry, 0, sizeof(float) * carried);
    for (long i = p.chunks - 1; i >= 0; i--) {
        const Chunk chunk(p, sample, i), after(p, sample, std::min<long>(i + 1, p.chunks - 1));
        const Chunk* next = i + 1 < p.chunks ? &after : nullptr;
        const Rows y = chunk.rows(p.y);
        const Rows dy = p.z.at ? Rows{w.shared.dy, s.width} : chunk.rows(p.dout);
        prepare(p, chunk, w, true);
        w.meet();
        multiply_tokens(p, chunk, w);
        if (p.z.at) gate_backward(p, chunk, w, y);
        w.meet();
        scan_chunk_backward(p, chunk, next, w, y, dy, i > 0 || p.has_initial);
        w.meet();
        if (w.rank == 0) finish_B_and_C(p, chunk, w);
        w.meet();
        give_back(p, chunk, w);
        w.meet();
    }
}

long threads_of(const Call& p) {
#if defined(_OPENMP)
    return p.threads;
#else
    return 1;
#endif
}

bool by_sample(const Call& p) { return p.batch >= threads_of(p); }

// Of all threads: each a sample of its own, or all of them one together.
long lay_out(const Call& p, bool backward, float* at, Shared* shareds, Own* owns) {
    Arena arena{at};
    for (long i = 0; i < threads_of(p); i++) {
        const Shared shared = by_sample(p) || i == 0 ? take_shared(arena, p, backward) : Shared{};
        const Own own = take_own(arena, p, backward);
        if (at) shareds[i] = shared, owns[i] = own;
    }
    return arena.used;
}

constexpr long MOST_THREADS = 1024;

void run(const Call& p, bool backward) {
    static_assert(PANEL % LANES == 0 && 16 % LANES == 0);
    Shared shareds[MOST_THREADS];
    Own owns[MOST_THREADS];
    lay_out(p, backward, p.scratch, shareds, owns);
    const auto work = backward ? backward_sample : forward_sample;
#if defined(_OPENMP)
#pragma omp parallel num_threads(p.threads)
#endif
    {
        long number = 0, all = 1;
#if defined(_OPENMP)
        number = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        if (by_sample(p)) {
            const Worker alone{0, 1, number, shareds[number], owns + number};
            for (long sample = number; sample < p.batch; sample += all) work(p, sample, alone);
        } else {
            const Worker together{number, all, number, shareds[0], owns};
            for (long sample = 0; sample < p.batch; sample++) work(p, sample, together);
        }
    }
}

}  // namespace

extern "C" {

int64_t patchscale_call_bytes() { return sizeof(Call); }

// Floats that a call needs as scratch; nothing is read of the call but its sizes.
int64_t patchscale_scratch(const Call* call, int64_t backward) {
    return lay_out(*call, backward, nullptr, nullptr, nullptr);
}

void patchscale_forward(const Call* call) { run(*call, false); }

void patchscale_backward(const Call* call) { run(*call, true); }
}

// What a call hands over, and how threads share it: chunks, their tokens, and memory that the caller lends.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

// The caller's (batch, length, channels); channels are consecutive.
struct Tensor3 {
    void* at;
    int64_t batch, row;
};

namespace {

constexpr long GROUP = 8;  // panels, at most, whose rows are multiplied by each other at a time

// One chunk of such a tensor, or of scratch, by scan order.
template <typename Element>
struct RowsOf {
    Element* at;
    long row;
    Element* operator[](long i) const { return at + i * row; }
};
using Rows = RowsOf<float>;

}  // namespace

// What a caller hands over; calls.py fills it, field by field. A pointer may be null where that is said.
struct Call {
    int64_t batch, body, reverse, heads, headdim, d_state, taps, chunks, longest, threads;
    int64_t heading;      // 1 if the token that stands last is scanned first, a chunk of its own without output
    int64_t last;         // where it stands
    int64_t in_bfloat16;  // x, z, dt, out, their gradients and history; what is float32 otherwise, like all else
    double eps;
    const int64_t* starts;     // of chunks in scan order, a heading token aside: first place; and the length
    Tensor3 x, B, C, z;        // x: x, B and C as they enter the convolution, if there is one; z: null without a gate
    Tensor3 dt;                // (batch, length, heads): step sizes; with a dt_bias, before it and softplus
    const float *dt_bias, *A;  // (heads,); dt_bias may be null
    const float *conv_weight, *conv_bias;  // (conv_dim, taps), (conv_dim,); the kernels read (taps, conv_dim)
    const void* history;                   // (batch, taps - 1, conv_dim)
    const float *D, *norm_weight;          // (heads,), (width,); the kernels read a D for each channel
    const float* initial_state;            // (batch, heads, headdim, d_state), or null: zero
    float* final_state;                    // the same; null if not wanted
    float* states;   // (batch, chunks, panels, d_state, 64): G, chunks in scan order; null if not kept
    Tensor3 y, out;  // y: null if not kept
    // The backward's
    const float* grad_final;  // like final_state, which is read then; null if nothing comes back
    float* dinitial_state;    // null if there is no initial state
    Tensor3 dout, dz, dx, dB, dC, ddt;
    float* dhistory;
    float *dconv_weight, *dconv_bias, *ddt_bias, *dA, *dD, *dnorm_weight;  // like the parameters; null without them
};

namespace {

struct Sizes {
    long width, n, conv_dim, panels, pitch, rows;

    explicit Sizes(const Call& p)
        : width(p.heads * p.headdim),
          n(p.d_state),
          conv_dim(width + 2 * n),
          panels(width / PANEL),
          pitch((p.longest + 15) / 16 * 16),
          rows(pitch) {}
    long state() const { return panels * n * PANEL; }
};

// Gradients of parameters as the kernels read these, one after the other; none where there is no such parameter.
struct Sums {
    float *conv_weight, *conv_bias, *dt_bias, *A, *D, *norm_weight;
    long count;

    Sums(const Call& p, float* at) {
        const Sizes s(p);
        count = 0;
        auto take = [&](bool given, long length) {
            float* taken = at + count;
            count += given ? length : 0;
            return taken;
        };
        conv_weight = take(p.taps, p.taps * s.conv_dim);
        conv_bias = take(p.taps, s.conv_dim);
        dt_bias = take(p.dt_bias, p.heads);
        A = take(true, p.heads);
        D = take(p.D, s.width);
        norm_weight = take(p.D, s.width);
    }
};

// Memory of the threads that work on a sample together, and of each of them.
struct Shared {
    float *act, *slope, *dact, *y, *dy, *carry;
    float *state, *final_state;  // (panels, d_state, 64): S, or the gradient of G; H after the last chunk
};
struct Own {
    float *B_turned, *M, *G, *written, *product, *line;
    float *read, *dS, *dM, *dB, *dC;
    // Of the chunk's tokens and heads: step sizes and softplus's slope there, factors of decays, sums of log-decays,
    // and what the gradients of step sizes are made of: see decays.hpp.
    float *dt, *dt_slope, *read_by, *write_dt, *along_x, *along_y;
    double *cs, *from_middle;
    // Of the chunk's heads
    float *enter, *enter_rest, *along_states;
    float* sums;  // a chunk's: added to those of all chunks at its end, so that small numbers meet small ones
    double *left, *middle, *left_before, *middle_after;
    bool* strong;
    float *decay, *decayed_M, *C_from_start, *B_to_end, *from_start, *to_end, *strong_logs, *strong_x;
    float *strong_dy, *strong_pairs, *strong_products, *strong_tokens;
};

struct Arena {
    float* at;
    long used = 0;
    template <typename Number = float>
    Number* take(long count) {
        float* taken = at ? at + used : nullptr;
        used += (count * sizeof(Number) + 63) / 64 * 16;
        return reinterpret_cast<Number*>(taken);
    }
};

Shared take_shared(Arena& arena, const Call& p, bool backward) {
    const Sizes s(p);
    Shared m{};
    m.act = arena.take(s.rows * s.conv_dim);
    m.state = arena.take(s.state());
    if (backward) {
        m.slope = arena.take(s.rows * s.conv_dim);
        m.dact = arena.take(s.rows * s.conv_dim);
        m.dy = arena.take(s.rows * s.width);
        m.carry = arena.take(std::max<long>(p.taps - 1, 0) * s.conv_dim);
        if (p.grad_final) m.final_state = arena.take(s.state());
    } else {
        m.y = arena.take(s.rows * s.width);
    }
    return m;
}

Own take_own(Arena& arena, const Call& p, bool backward) {
    const Sizes s(p);
    const long panels = backward ? GROUP : 1, numbers = s.rows * p.heads;
    Own m{};
    m.B_turned = arena.take(s.n * s.pitch);
    m.M = arena.take(s.rows * s.pitch);
    m.G = arena.take(s.n * PANEL);
    m.written = arena.take(panels * s.rows * PANEL);
    m.product = arena.take(s.rows * PANEL);
    m.line = arena.take(3 * s.width);
    for (float** each : {&m.dt, &m.read_by, &m.write_dt}) *each = arena.take(numbers);
    for (double** each : {&m.cs, &m.from_middle}) *each = arena.take<double>(numbers);
    for (float** each : {&m.enter, &m.enter_rest}) *each = arena.take(p.heads);
    for (double** each : {&m.left, &m.middle, &m.left_before, &m.middle_after}) *each = arena.take<double>(p.heads);
    m.strong = arena.take<bool>(p.heads);
    if (backward) {
        m.read = arena.take(panels * s.rows * PANEL);
        m.dS = arena.take(panels * s.n * PANEL);
        m.dM = arena.take(s.rows * s.pitch);
        m.dB = arena.take(s.rows * s.n);
        m.dC = arena.take(s.rows * s.n);
        for (float** each : {&m.dt_slope, &m.along_x, &m.along_y}) *each = arena.take(numbers);
        m.along_states = arena.take(p.heads);
        m.sums = arena.take(Sums(p, nullptr).count);
    }
    for (float** pairs : {&m.decay, &m.decayed_M, &m.strong_pairs}) *pairs = arena.take(s.rows * s.pitch);
    for (float** rows : {&m.strong_x, &m.strong_dy}) *rows = arena.take(s.rows * PANEL);
    for (float** rows : {&m.C_from_start, &m.B_to_end, &m.strong_products}) *rows = arena.take(s.rows * s.n);
    for (float** tokens : {&m.from_start, &m.to_end, &m.strong_logs, &m.strong_tokens}) *tokens = arena.take(s.pitch);
    return m;
}

// One of the threads that work on a sample together.
struct Worker {
    long rank, size;  // among them
    float* sums;      // what it has found of the gradients of parameters, see Sums
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

// Where the token at a place in the scan stands.
long token_at(const Call& p, long place) {
    if (p.heading && place == 0) return p.last;
    place -= p.heading;
    return p.reverse && place < p.body ? p.body - 1 - place : place;
}

struct Chunk {
    long sample, number, start, size, token, step;
    bool heading;

    // number: in scan order
    Chunk(const Call& p, long sample, long number)
        : sample(sample),
          number(number),
          start(number < p.heading ? 0 : p.heading + p.starts[number - p.heading]),
          size(number < p.heading ? 1 : p.heading + p.starts[number - p.heading + 1] - start),
          token(token_at(p, start)),
          step(size > 1 && token_at(p, start + 1) < token ? -1 : 1),
          heading(p.heading && number == 0) {}
    template <typename Element>
    RowsOf<Element> rows(const Tensor3& t) const {
        return {static_cast<Element*>(t.at) + sample * t.batch + token * t.row, step * t.row};
    }
};

}  // namespace

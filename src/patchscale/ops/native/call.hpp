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

// What a call reads and writes; calls.py fills it, field by field. A pointer may be null where that is said.
struct Call {
    int64_t batch, length, body, reverse, heads, headdim, d_state, taps, chunks, longest, threads;
    int64_t in_bfloat16;             // x, z, out, dout, dz, dx and history; what is float32 otherwise, like all else
    int64_t has_initial, has_final;  // whether a state enters, and whether one leaves (or its gradient comes back)
    double eps;
    const int64_t *starts, *numbers;  // of chunks in scan order: first place, and where it stands among them
    Tensor3 x, B, C, z;  // x: x, B and C as they enter the convolution, if there is one; z: null without a gate
    const float *conv_weight, *conv_bias;  // (taps, conv_dim), (conv_dim,)
    const void* history;                   // (batch, taps - 1, conv_dim)
    const float *D, *norm_weight;          // (width,), one number for each channel
    const float *read, *write_dt;          // (batch, length, heads)
    const float *enter, *enter_rest;       // (batch, chunks + 1, heads); the second may be null
    // Heads that have no factors in a chunk, (chunks, heads), null if none: see pairwise.hpp
    const uint8_t* strong;
    const double* cs;  // (batch, length, heads), as dt
    const float* dt;
    float* state;    // (batch, panels, d_state, 64): S, or the gradient of G
    float* states;   // (batch, chunks, panels, d_state, 64): G; null if not kept
    Tensor3 y, out;  // y: null if not kept
    // The backward's
    const float* final_state;  // like state: H after the last chunk
    Tensor3 dout, dz, dx, dB, dC;
    float *along_x, *along_y, *along_states;  // (batch, length, heads) twice, (batch, chunks, heads)
    float *strong_ddt, *strong_dlog_decay;    // (batch, length, heads), of the heads without factors
    // For each worker: of conv_weight, conv_bias, norm_weight, D; and of the history
    float *dconv_weight, *dconv_bias, *dnorm_weight, *dD, *dhistory;
    float* scratch;
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

// Memory of the threads that work on a sample together, and of each of them.
struct Shared {
    float *act, *slope, *dact, *y, *dy, *carry;
};
struct Own {
    float *B_turned, *M, *G, *written, *product, *line;
    float *read, *dS, *dM, *dB, *dC;
    float *decay, *decayed_M, *C_from_start, *B_to_end, *from_start, *to_end, *strong_logs, *strong_x;
    float *strong_dy, *strong_pairs, *strong_products, *strong_tokens;
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
    if (p.strong) {
        for (float** pairs : {&m.decay, &m.decayed_M, &m.strong_pairs}) *pairs = arena.take(s.rows * s.pitch);
        for (float** rows : {&m.strong_x, &m.strong_dy}) *rows = arena.take(s.rows * PANEL);
        for (float** rows : {&m.C_from_start, &m.B_to_end, &m.strong_products}) *rows = arena.take(s.rows * s.n);
        for (float** tokens : {&m.from_start, &m.to_end, &m.strong_logs, &m.strong_tokens})
            *tokens = arena.take(s.pitch);
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
        : sample(sample),
          start(p.starts[i]),
          size(p.starts[i + 1] - p.starts[i]),
          number(p.numbers[i]) {
        const bool from_right = p.reverse && start < p.body;
        token = from_right ? p.body - 1 - start : start;
        step = from_right ? -1 : 1;
    }
    template <typename Element>
    RowsOf<Element> rows(const Tensor3& t) const {
        return {static_cast<Element*>(t.at) + sample * t.batch + token * t.row, step * t.row};
    }
    Rows heads(const Call& p, const float* values) const {
        return {const_cast<float*>(values) + (sample * p.length + token) * p.heads, step * long(p.heads)};
    }
};

}  // namespace

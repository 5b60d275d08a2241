// Forward: convolution and SiLU, the scan of a chunk, gate and norm.

#pragma once

#include <cmath>
#include <cstring>

#include "call.hpp"
#include "decays.hpp"
#include "pairwise.hpp"
#include "vectors.hpp"

namespace {

// A token by its place in the scan, before the convolution; places before the first are the history's.
template <typename Element>
const Element* entering(const Call& p, const Sizes& s, long sample, long place) {
    if (place < 0)
        return static_cast<const Element*>(p.history) + (sample * (p.taps - 1) + p.taps - 1 + place) * s.conv_dim;
    return static_cast<const Element*>(p.x.at) + sample * p.x.batch + token_at(p, place) * p.x.row;
}

// SiLU of the convolution, and its slope if slope is not null: channels from..to of a chunk.
template <int TAPS, typename Element>
void convolve(const Call& p, const Chunk& chunk, long from, long to, float* act, float* slope) {
    const Sizes s(p);
    for (long t = 0; t < chunk.size; t++) {
        const Element* rows[TAPS];
        for (int k = 0; k < TAPS; k++)
            rows[k] = entering<Element>(p, s, chunk.sample, chunk.start + t + k - (TAPS - 1));
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
template <typename Element>
void prepare(const Call& p, const Chunk& chunk, const Worker& w, bool backward) {
    const Sizes s(p);
    float *act = w.shared.act, *slope = backward ? w.shared.slope : nullptr;
    const long from = 16 * w.first(s.conv_dim / 16), to = 16 * w.last(s.conv_dim / 16);
    switch (p.taps) {
        case 1:
            convolve<1, Element>(p, chunk, from, to, act, slope);
            break;
        case 2:
            convolve<2, Element>(p, chunk, from, to, act, slope);
            break;
        case 3:
            convolve<3, Element>(p, chunk, from, to, act, slope);
            break;
        case 4:
            convolve<4, Element>(p, chunk, from, to, act, slope);
            break;
        default: {
            const Rows x = chunk.rows<float>(p.x), B = chunk.rows<float>(p.B), C = chunk.rows<float>(p.C);
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
    const Call& p, long panel, long rows, const float* factors, const float* from, long from_row, float* to, long to_row
) {
    for (long t = 0; t < rows; t++)
        for (long c = 0; c < PANEL; c += 16) {
            const float factor = factors[t * p.heads + (PANEL * panel + c) / p.headdim];
            for (long v = c; v < c + 16; v += LANES) store(to + t * to_row + v, load(from + t * from_row + v) * factor);
        }
}

void scan_chunk(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y, bool reads, bool passes) {
    const Sizes s(p);
    const Own& own = w.own();
    const float *act = w.shared.act, *B = act + s.width, *C = B + s.n;
    for (long panel = w.first(s.panels); panel < w.last(s.panels); panel++) {
        float* state = w.shared.state + panel * s.n * PANEL;
        float* G = own.G;
        if (p.states) G = p.states + ((chunk.sample * p.chunks + chunk.number) * s.panels + panel) * s.n * PANEL;
        if (reads) enter(p, own, panel, state, G);
        scale_panel(p, panel, chunk.size, own.write_dt, act + PANEL * panel, s.conv_dim, own.written, PANEL);
        const Factors with_states = {C, s.conv_dim, 1, G, PANEL, 0, s.n};
        const Factors with_tokens = {own.M, s.pitch, 1, own.written, PANEL, 0, chunk.size};
        const Factors parts[] = {reads ? with_states : with_tokens, with_tokens};
        product(chunk.size, PANEL, parts, reads ? 2 : 1, Steps::up_to_row, own.product, PANEL);
        scale_panel(p, panel, chunk.size, own.read_by, own.product, PANEL, y.at + PANEL * panel, y.row);
        if (passes) {
            if (reads) std::memcpy(state, G, sizeof(float) * s.n * PANEL);
            const Factors entering[] = {{B, 1, s.conv_dim, own.written, PANEL, 0, chunk.size}};
            product(s.n, PANEL, entering, 1, Steps::all, state, PANEL, reads);
        }
        for (long head = PANEL * panel / p.headdim; head < PANEL * (panel + 1) / p.headdim; head++)
            if (own.strong[head]) StrongHead(p, chunk, w, head).forward(y, G, state, reads, passes);
    }
}

// Gate and norm of a chunk: out = norm_weight * g / rms(g) with g = (y + D x) silu(z).
template <typename Element>
void gate(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y) {
    const Sizes s(p);
    const RowsOf<Element> z = chunk.rows<Element>(p.z), out = chunk.rows<Element>(p.out);
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
        for (long c = 0; c < s.width; c += LANES) store(out[t] + c, load(gated + c) * scale * load(p.norm_weight + c));
    }
}

template <typename Element>
void forward_sample(const Call& p, long sample, const Worker& w) {
    const Sizes s(p);
    const Own& own = w.own();
    const long first = w.first(s.panels), last = w.last(s.panels);
    auto state_of = [&](long panel) { return w.shared.state + panel * s.n * PANEL; };
    for (long panel = first; panel < last; panel++) read_panel(p, sample, panel, p.initial_state, state_of(panel));
    std::fill_n(own.left_before, p.heads, 0.0);
    for (long i = 0; i < p.chunks; i++) {
        const Chunk chunk(p, sample, i);
        const Rows y = p.y.at && !chunk.heading ? chunk.rows<float>(p.y) : Rows{w.shared.y, s.width};
        work_out_decays<Element>(p, chunk, w, false);
        factors_between(p, own.left_before, own.middle, own);
        std::swap_ranges(own.left_before, own.left_before + p.heads, own.left);
        prepare<Element>(p, chunk, w, false);
        w.meet();
        multiply_tokens(p, chunk, w);
        scan_chunk(p, chunk, w, y, i > 0 || p.initial_state, i + 1 < p.chunks || p.final_state);
        w.meet();
        if (p.z.at && !chunk.heading) gate<Element>(p, chunk, w, y);
        w.meet();
    }
    if (!p.final_state) return;
    std::fill_n(own.middle, p.heads, 0.0);
    factors_between(p, own.left_before, own.middle, own);
    for (long panel = first; panel < last; panel++) {
        enter(p, own, panel, state_of(panel), state_of(panel));
        write_panel(p, sample, panel, state_of(panel), p.final_state);
    }
}

}  // namespace

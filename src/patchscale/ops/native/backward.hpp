// Backward: the steps of forward.hpp from the last to the first. The convolution and M are computed again.

#pragma once

#include "forward.hpp"

namespace {

// The gradients of z, of y + D x (to shared dy) and of norm_weight.
template <typename Element>
void gate_backward(const Call& p, const Chunk& chunk, const Worker& w, const Rows& y) {
    const Sizes s(p);
    const RowsOf<Element> z = chunk.rows<Element>(p.z), dout = chunk.rows<Element>(p.dout),
                          dz = chunk.rows<Element>(p.dz);
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

// A group of panels, back through a chunk: gradients of x and of G, and this group's part of those of B, C and M.
void scan_panels_backward(
    const Call& p, const Chunk& chunk, const Chunk* next, const Worker& w, const Rows& y, const Rows& dy, bool reads,
    long first_panel, long last_panel
) {
    const Sizes s(p);
    const Own& own = w.own();
    const float *act = w.shared.act, *B = act + s.width, *C = B + s.n;
    const long panels = last_panel - first_panel, rows = (chunk.size + 3) / 4 * 4, rows_panel = s.rows * PANEL,
               state_panel = s.n * PANEL;
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
        float* dS = own.dS + place * state_panel;
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
                    for (long v = c; v < c + 16; v += LANES)
                        total += load(dG + i * PANEL + v) * load(G_next + i * PANEL + v);
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
        for (long head = PANEL * panel / p.headdim; head < PANEL * (panel + 1) / p.headdim; head++)
            if (is_strong(p, chunk, head))
                StrongHead(p, chunk, w, head)
                    .backward(
                        dy, reads ? states_of(chunk.number, panel) : nullptr, passes ? dS : nullptr, dG, w.shared.dact
                    );
    }
    // dM = dP X'^T, dC = dP G^T and dB = X' dS^T, summed over all channels.
    for (long i = 0; i < rows; i += 4) {
        const float *dP = own.read + i * PANEL, *written = own.written + i * PANEL;
        for (long j = 0; j <= i; j += 4)
            multiply_rows(
                panels, dP, rows_panel, own.written + j * PANEL, rows_panel, own.dM + i * s.pitch + j, s.pitch
            );
        for (long j = 0; j < s.n; j += 4) {
            if (reads)
                multiply_rows(
                    panels, dP, rows_panel, states_of(chunk.number, first_panel) + j * PANEL, state_panel,
                    own.dC + i * s.n + j, s.n
                );
            if (passes)
                multiply_rows(panels, written, rows_panel, own.dS + j * PANEL, state_panel, own.dB + i * s.n + j, s.n);
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
        scan_panels_backward(p, chunk, next, w, y, dy, reads, s.panels * g / groups, s.panels * (g + 1) / groups);
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
template <int TAPS, typename Element>
void convolve_backward(const Call& p, const Chunk& chunk, const Worker& w, long from, long to) {
    const Sizes s(p);
    const RowsOf<Element> dx = chunk.rows<Element>(p.dx);
    float *dpre = w.shared.dact, *carry = w.shared.carry;
    float* dtaps = p.dconv_weight + w.number * TAPS * s.conv_dim;
    float* dbias = p.dconv_bias + w.number * s.conv_dim;
    for (long t = 0; t < chunk.size; t++) {
        const Element* rows[TAPS];
        for (int k = 0; k < TAPS; k++)
            rows[k] = entering<Element>(p, s, chunk.sample, chunk.start + t + k - (TAPS - 1));
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
    auto dpre_at = [&](long t) {
        return t < chunk.size ? dpre + t * s.conv_dim : carry + (t - chunk.size) * s.conv_dim;
    };
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
template <typename Element>
void give_back(const Call& p, const Chunk& chunk, const Worker& w) {
    const Sizes s(p);
    const long from = 16 * w.first(s.conv_dim / 16), to = 16 * w.last(s.conv_dim / 16);
    switch (p.taps) {
        case 1:
            convolve_backward<1, Element>(p, chunk, w, from, to);
            break;
        case 2:
            convolve_backward<2, Element>(p, chunk, w, from, to);
            break;
        case 3:
            convolve_backward<3, Element>(p, chunk, w, from, to);
            break;
        case 4:
            convolve_backward<4, Element>(p, chunk, w, from, to);
            break;
        default: {
            const Rows dx = chunk.rows<float>(p.dx), dB = chunk.rows<float>(p.dB), dC = chunk.rows<float>(p.dC);
            for (long t = w.first(chunk.size); t < w.last(chunk.size); t++) {
                const float* row = w.shared.dact + t * s.conv_dim;
                std::memcpy(dx[t], row, sizeof(float) * s.width);
                std::memcpy(dB[t], row + s.width, sizeof(float) * s.n);
                std::memcpy(dC[t], row + s.width + s.n, sizeof(float) * s.n);
            }
        }
    }
}

template <typename Element>
void backward_sample(const Call& p, long sample, const Worker& w) {
    const Sizes s(p);
    const long carried = std::max<long>(p.taps - 1, 0) * s.conv_dim;
    if (w.rank == 0) std::memset(w.shared.carry, 0, sizeof(float) * carried);
    for (long i = p.chunks - 1; i >= 0; i--) {
        const Chunk chunk(p, sample, i), after(p, sample, std::min<long>(i + 1, p.chunks - 1));
        const Chunk* next = i + 1 < p.chunks ? &after : nullptr;
        const Rows y = chunk.rows<float>(p.y);
        const Rows dy = p.z.at ? Rows{w.shared.dy, s.width} : chunk.rows<float>(p.dout);
        prepare<Element>(p, chunk, w, true);
        w.meet();
        multiply_tokens(p, chunk, w);
        if (p.z.at) gate_backward<Element>(p, chunk, w, y);
        w.meet();
        scan_chunk_backward(p, chunk, next, w, y, dy, i > 0 || p.has_initial);
        w.meet();
        if (w.rank == 0) finish_B_and_C(p, chunk, w);
        w.meet();
        give_back<Element>(p, chunk, w);
        w.meet();
    }
}

}  // namespace

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
    float *skipped = w.own().line, *gates = skipped + s.width, *dnorm = Sums(p, w.own().sums).norm_weight;
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

// The same for the heading token, on which no output depends.
template <typename Element>
void no_output(const Call& p, const Chunk& chunk, const Worker& w) {
    const Sizes s(p);
    std::memset(w.shared.dy, 0, sizeof(float) * s.width);
    std::memset(chunk.rows<Element>(p.dz)[0], 0, sizeof(Element) * s.width);
}

// A group of panels, back through a chunk: gradients of x and of G, and this group's part of those of B, C and M.
void scan_panels_backward(
    const Call& p, const Chunk& chunk, const Worker& w, const Rows& y, const Rows& dy, bool reads, bool passes,
    long first_panel, long last_panel
) {
    const Sizes s(p);
    const Own& own = w.own();
    const float *act = w.shared.act, *B = act + s.width, *C = B + s.n;
    const long panels = last_panel - first_panel, rows = (chunk.size + 3) / 4 * 4, rows_panel = s.rows * PANEL,
               state_panel = s.n * PANEL;
    auto states_of = [&](long number, long panel) {
        return p.states + ((chunk.sample * p.chunks + number) * s.panels + panel) * state_panel;
    };
    for (long panel = first_panel; panel < last_panel; panel++) {
        const long place = panel - first_panel;
        float *written = own.written + place * rows_panel, *dP = own.read + place * rows_panel;
        float* dS = own.dS + place * state_panel;
        const float *x = act + PANEL * panel, *dy_panel = dy.at + PANEL * panel, *y_panel = y.at + PANEL * panel;
        float* dG = w.shared.state + panel * state_panel;
        scale_panel(p, panel, chunk.size, own.write_dt, x, s.conv_dim, written, PANEL);
        scale_panel(p, panel, chunk.size, own.read_by, dy_panel, dy.row, dP, PANEL);
        for (long t = chunk.size; t < rows; t++) {
            std::memset(written + t * PANEL, 0, sizeof(float) * PANEL);
            std::memset(dP + t * PANEL, 0, sizeof(float) * PANEL);
        }
        if (passes) {
            const bool is_last = chunk.number + 1 == p.chunks;
            const float* G_next =
                is_last ? w.shared.final_state + panel * state_panel : states_of(chunk.number + 1, panel);
            for (long c = 0; c < PANEL; c += 16) {
                vec total = {};
                for (long i = 0; i < s.n; i++)
                    for (long v = c; v < c + 16; v += LANES)
                        total += load(dG + i * PANEL + v) * load(G_next + i * PANEL + v);
                own.along_states[(PANEL * panel + c) / p.headdim] += sum(total);
            }
            enter(p, own, panel, dG, dS);
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
                    store(dx + v, d * own.write_dt[t * p.heads + head]);
                }
                own.along_x[t * p.heads + head] = sum(with_x);
                own.along_y[t * p.heads + head] = sum(with_y);
            }
            if (p.D) {
                float* dD = Sums(p, own.sums).D + PANEL * panel;
                for (long c = 0; c < PANEL; c += LANES) {
                    const vec d = load(dy_t + c);
                    store(dx + c, load(dx + c) + d * load(p.D + PANEL * panel + c));
                    store(dD + c, load(dD + c) + d * load(x_t + c));
                }
            }
        }
        for (long head = PANEL * panel / p.headdim; head < PANEL * (panel + 1) / p.headdim; head++)
            if (own.strong[head])
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

// The panels of a thread: it goes through them in groups.
struct Share {
    long rounds, groups, panels;
    Share(const Sizes& s, const Worker& w)
        : rounds((s.panels + GROUP * w.size - 1) / (GROUP * w.size)),
          groups(rounds * w.size),
          panels(s.panels) {}
    long first(long group) const { return panels * group / groups; }
};

template <typename Element>
void scan_chunk_backward(
    const Call& p, const Chunk& chunk, const Worker& w, const Rows& y, const Rows& dy, bool reads, bool passes
) {
    const Sizes s(p);
    const Share share(s, w);
    const Own& own = w.own();
    std::memset(own.dM, 0, sizeof(float) * s.rows * s.pitch);
    std::memset(own.dB, 0, sizeof(float) * s.rows * s.n);
    std::memset(own.dC, 0, sizeof(float) * s.rows * s.n);
    std::memset(own.along_states, 0, sizeof(float) * p.heads);
    const long begin = w.rank * share.rounds, end = begin + share.rounds;
    for (long group = begin; group < end; group++)
        scan_panels_backward(p, chunk, w, y, dy, reads, passes, share.first(group), share.first(group + 1));
    const long heads = PANEL / p.headdim;  // of a panel
    give_back_decays<Element>(p, chunk, w, heads * share.first(begin), heads * share.first(end));
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
    float *dtaps = Sums(p, w.own().sums).conv_weight, *dbias = Sums(p, w.own().sums).conv_bias;
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
    const Own& own = w.own();
    const long first = w.first(s.panels), last = w.last(s.panels), panel_size = s.n * PANEL;
    const long carried = std::max<long>(p.taps - 1, 0) * s.conv_dim;
    if (w.rank == 0) std::memset(w.shared.carry, 0, sizeof(float) * carried);
    for (long panel = first; panel < last; panel++) {
        read_panel(p, sample, panel, p.grad_final, w.shared.state + panel * panel_size);
        if (p.grad_final) read_panel(p, sample, panel, p.final_state, w.shared.final_state + panel * panel_size);
    }
    std::fill_n(own.middle_after, p.heads, 0.0);
    const long parameters = Sums(p, own.sums).count;
    for (long i = p.chunks - 1; i >= 0; i--) {
        const Chunk chunk(p, sample, i);
        const Rows dy = p.z.at ? Rows{w.shared.dy, s.width} : chunk.rows<float>(p.dout);
        const Rows y = chunk.heading ? dy : chunk.rows<float>(p.y);  // both zero
        work_out_decays<Element>(p, chunk, w, true);
        factors_between(p, own.left, own.middle_after, own);
        std::swap_ranges(own.middle_after, own.middle_after + p.heads, own.middle);
        std::fill_n(own.sums, parameters, 0.0f);
        prepare<Element>(p, chunk, w, true);
        w.meet();
        multiply_tokens(p, chunk, w);
        if (chunk.heading) {
            if (w.rank == 0) no_output<Element>(p, chunk, w);
        } else if (p.z.at) {
            gate_backward<Element>(p, chunk, w, y);
        }
        w.meet();
        scan_chunk_backward<Element>(p, chunk, w, y, dy, i > 0 || p.initial_state, i + 1 < p.chunks || p.grad_final);
        w.meet();
        if (w.rank == 0) finish_B_and_C(p, chunk, w);
        w.meet();
        give_back<Element>(p, chunk, w);
        for (long k = 0; k < parameters; k++) w.sums[k] += own.sums[k];
        w.meet();
    }
    if (!p.dinitial_state) return;
    std::fill_n(own.left, p.heads, 0.0);
    factors_between(p, own.left, own.middle_after, own);
    for (long panel = first; panel < last; panel++) {
        float* state = w.shared.state + panel * panel_size;
        enter(p, own, panel, state, state);
        write_panel(p, sample, panel, state, p.dinitial_state);
    }
}

}  // namespace

// Heads that decay too strongly in a chunk for a product of two factors: the decay of every pair of tokens is worked
// out.
//
// The mathematics is that of pairwise.py. Such a head has no part in the factors (they are 0), its G is H and its S is
// H' (so nothing decays on its way between chunks), and it goes through the chunk here, after its panel did:
//
//     Y  = (D * M) @ X + exp(cs) C @ H           with D = exp(cs_t - cs_s) and X = dt x
//     H' = exp(cs_Q) H + (exp(cs_Q - cs) B)^T @ X

#pragma once

#include <cmath>
#include <cstring>

#include "call.hpp"
#include "vectors.hpp"

namespace {

// exp, but 0 for decays to nothing: what is left would become subnormal, which is slow. On count values, to a multiple
// of 16 of them.
void decay_factors(const float* logs, float* factors, long count) {
    for (long i = 0; i < count; i += LANES) {
        const vec log = load(logs + i);
        store(factors + i, log < -61.0f ? vec{} : exp(log));
    }
}

// A head of a chunk, with the columns of its panel at the place that they have there, zeros beside.
struct StrongHead {
    const Call& p;
    const Chunk& chunk;
    const Own& own;
    const Sizes s;
    const float *act, *B, *C;
    const long head, column;
    float whole;

    StrongHead(const Call& p, const Chunk& chunk, const Worker& w, long head)
        : p(p),
          chunk(chunk),
          own(w.own()),
          s(p),
          act(w.shared.act),
          B(act + s.width),
          C(B + s.n),
          head(head),
          column(head * p.headdim % PANEL) {
        const RowsOf<const double> cs{own.cs, long(p.heads)};
        const double total = cs[chunk.size - 1][head];
        float* logs = own.strong_logs;
        for (long t = 0; t < chunk.size; t++) {
            for (long u = 0; u <= t; u++) logs[u] = float(cs[t][head] - cs[u][head]);
            for (long u = t + 1; u < s.pitch; u++) logs[u] = -100;
            decay_factors(logs, own.decay + t * s.pitch, s.pitch);
            for (long u = 0; u < s.pitch; u += LANES)
                store(
                    own.decayed_M + t * s.pitch + u, load(own.decay + t * s.pitch + u) * load(own.M + t * s.pitch + u)
                );
        }
        scale_tokens([&](long t) { return cs[t][head]; }, C, own.from_start, own.C_from_start);
        scale_tokens([&](long t) { return total - cs[t][head]; }, B, own.to_end, own.B_to_end);
        whole = own.from_start[chunk.size - 1];
        const Rows dt{own.dt, long(p.heads)};
        copy_columns({const_cast<float*>(act) + p.headdim * head, s.conv_dim}, own.strong_x, [&](long t) {
            return dt[t][head];
        });
    }

    template <typename Log>
    void scale_tokens(const Log& log, const float* from, float* factors, float* to) {
        float* logs = own.strong_logs;
        for (long t = 0; t < s.pitch; t++) logs[t] = t < chunk.size ? float(log(t)) : -100;
        decay_factors(logs, factors, s.pitch);
        for (long t = 0; t < chunk.size; t++)
            for (long i = 0; i < s.n; i += LANES) store(to + t * s.n + i, load(from + t * s.conv_dim + i) * factors[t]);
    }

    // Rows of 64, and of a multiple of four tokens.
    template <typename Factor>
    void copy_columns(const Rows& from, float* to, const Factor& factor) {
        std::memset(to, 0, sizeof(float) * s.rows * PANEL);
        for (long t = 0; t < chunk.size; t++)
            for (long c = 0; c < p.headdim; c += LANES)
                store(to + t * PANEL + column + c, load(from[t] + c) * factor(t));
    }

    // Write this head's y and, where a state leaves, its H'; H is at G, among the columns of its panel.
    void forward(const Rows& y, const float* G, float* state, bool reads, bool passes) {
        const Factors from_state = {own.C_from_start, s.n, 1, G + column, PANEL, 0, s.n};
        const Factors from_tokens = {own.decayed_M, s.pitch, 1, own.strong_x + column, PANEL, 0, chunk.size};
        const Factors parts[] = {reads ? from_state : from_tokens, from_tokens};
        product(chunk.size, p.headdim, parts, reads ? 2 : 1, Steps::up_to_row, y.at + p.headdim * head, y.row);
        if (!passes) return;
        decay_state(reads ? G : nullptr, state);
        const Factors written[] = {{own.B_to_end, 1, s.n, own.strong_x + column, PANEL, 0, chunk.size}};
        product(s.n, p.headdim, written, 1, Steps::all, state + column, PANEL, true);
    }

    // to = exp(cs_Q) from, 0 for null.
    void decay_state(const float* from, float* to) {
        for (long i = 0; i < s.n; i++)
            for (long c = column; c < column + p.headdim; c += LANES)
                store(to + i * PANEL + c, from ? load(from + i * PANEL + c) * whole : vec{});
    }

    // Add to the gradients of x, in dact, and of B, C and M; write those of H to dG, of dt to along_x and of log-decays
    // to along_y. dS is the gradient of H'; null where no state leaves, and G and dG where none is read.
    void backward(const Rows& dy, const float* G, const float* dS, float* dG, float* dact) {
        copy_columns({dy.at + p.headdim * head, dy.row}, own.strong_dy, [](long) { return 1.0f; });
        const float* columns_of_dy = own.strong_dy + column;

        const Factors from_state = {own.B_to_end, s.n, 1, dS ? dS + column : nullptr, PANEL, 0, s.n};
        const Factors from_tokens = {own.decayed_M, 1, s.pitch, columns_of_dy, PANEL, 0, chunk.size};
        const Factors parts[] = {dS ? from_state : from_tokens, from_tokens};
        product(chunk.size, p.headdim, parts, dS ? 2 : 1, Steps::from_row, own.product, PANEL);
        const Rows dt{own.dt, long(p.heads)}, ddt{own.along_x, long(p.heads)};
        for (long t = 0; t < chunk.size; t++) {
            const float* x = act + t * s.conv_dim + p.headdim * head;
            float* dx = dact + t * s.conv_dim + p.headdim * head;
            vec along = {};
            for (long c = 0; c < p.headdim; c += LANES) {
                const vec d = load(own.product + t * PANEL + c);
                along += d * load(x + c);
                store(dx + c, load(dx + c) + d * dt[t][head]);
            }
            ddt[t][head] = sum(along);
        }
        if (G) {
            decay_state(dS, dG);
            const Factors read[] = {{own.C_from_start, 1, s.n, columns_of_dy, PANEL, 0, chunk.size}};
            product(s.n, p.headdim, read, 1, Steps::all, dG + column, PANEL, true);
        }
        gradients_of_decays(G, dS);
    }

    // A decay's gradient is the decay times its own gradient, and every log-decay between two tokens has it: summed
    // pair by pair, nothing cancels.
    void gradients_of_decays(const float* G, const float* dS) {
        const Rows gradient{own.along_y, long(p.heads)};
        float *pairs = own.strong_pairs, *dtokens = own.strong_tokens;
        for (long t = 0; t < chunk.size; t++) gradient[t][head] = 0;

        std::memset(pairs, 0, sizeof(float) * s.rows * s.pitch);
        for (long t = 0; t < chunk.size; t += 4)
            for (long u = 0; u <= t; u += 4)
                multiply_rows(
                    1, own.strong_dy + t * PANEL, 0, own.strong_x + u * PANEL, 0, pairs + t * s.pitch + u, s.pitch
                );
        for (long t = 0; t < chunk.size; t++) {
            float before = 0;
            for (long u = 0; u <= t; u++) {
                const long place = t * s.pitch + u;
                gradient[u][head] += before;
                before += pairs[place] * own.decayed_M[place];
                own.dM[place] += pairs[place] * own.decay[place];
            }
        }
        if (G) {  // out of the state before: a log-decay is in what its token and those after it read
            along_tokens(own.strong_dy, G, own.from_start, own.C_from_start, own.dC);
            float after = 0;
            for (long t = chunk.size - 1; t >= 0; t--) gradient[t][head] += after += dtokens[t];
        }
        if (dS) {  // into the next state: a log-decay is in what the tokens before it write
            along_tokens(own.strong_x, dS, own.to_end, own.B_to_end, own.dB);
            float before = 0;
            for (long t = 0; t < chunk.size; t++) {
                gradient[t][head] += before;
                before += dtokens[t];
            }
        }
        if (G && dS) {
            vec total = {};
            for (long i = 0; i < s.n; i++)
                for (long c = column; c < column + p.headdim; c += LANES)
                    total += load(G + i * PANEL + c) * load(dS + i * PANEL + c);
            const float along = whole * sum(total);
            for (long t = 0; t < chunk.size; t++) gradient[t][head] += along;
        }
    }

    // What tokens and a state have to do with each other: scaled as the tokens are, added to gradients of B or C; and
    // for each token summed with its B or C, which is so scaled already.
    void along_tokens(
        const float* rows, const float* state, const float* factors, const float* scaled, float* gradients
    ) {
        float* products = own.strong_products;
        std::memset(products, 0, sizeof(float) * s.rows * s.n);
        for (long t = 0; t < chunk.size; t += 4)
            for (long i = 0; i < s.n; i += 4)
                multiply_rows(1, rows + t * PANEL, 0, state + i * PANEL, 0, products + t * s.n + i, s.n);
        for (long t = 0; t < chunk.size; t++) {
            vec along = {};
            for (long i = t * s.n; i < (t + 1) * s.n; i += LANES) {
                along += load(products + i) * load(scaled + i);
                store(gradients + i, load(gradients + i) + load(products + i) * factors[t]);
            }
            own.strong_tokens[t] = sum(along);
        }
    }
};

}  // namespace

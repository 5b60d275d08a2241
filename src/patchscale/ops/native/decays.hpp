// Step sizes and decays of a chunk, for all heads, and their gradients.
//
// The mathematics is that of decays.py. Numbers of tokens and heads are [token][head], tokens in scan order. Every
// thread works them out for itself, which costs less than to wait for another's; gradients it makes of its own heads.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "call.hpp"
#include "vectors.hpp"

namespace {

// Log-decays from S of a chunk to G of the next, cut in two: exp of less than the first is no normal number.
void factors_between(const Call& p, const double* left, const double* middle, const Own& own) {
    const double floor = 0.9 * std::log(double(FLT_MIN));
    for (long h = 0; h < p.heads; h++) {
        const double log = left[h] + middle[h], bounded = std::max(log, floor);
        own.enter[h] = std::exp(bounded);
        own.enter_rest[h] = log == bounded ? 1.0f : float(std::exp(log - bounded));
    }
}

// Sums of log-decays up to each token, in float64: an error in them is a relative error of what they multiply.
void sum_log_decays(const Call& p, long size, const float* dt, double* cs) {
    for (long h = 0; h < p.heads; h++) cs[h] = double(dt[h]) * p.A[h];
    for (long i = p.heads; i < size * p.heads; i += p.heads)
        for (long h = 0; h < p.heads; h++) cs[i + h] = cs[i - p.heads + h] + double(dt[i + h]) * p.A[h];
}

template <typename Element>
void work_out_decays(const Call& p, const Chunk& chunk, const Worker& w, bool backward) {
    const Own& own = w.own();
    const long heads = p.heads, count = chunk.size * heads;
    const RowsOf<Element> given = chunk.rows<Element>(p.dt);
    for (long t = 0; t < chunk.size; t++)
        for (long h = 0; h < heads; h++)
            own.dt[t * heads + h] = load_number(given[t][h]) + (p.dt_bias ? p.dt_bias[h] : 0.0f);
    if (p.dt_bias)
        for (long i = 0; i < count; i += LANES) {
            const vec step = load(own.dt + i);
            if (backward) store(own.dt_slope + i, sigmoid(step));
            store(own.dt + i, softplus(step));
        }
    sum_log_decays(p, chunk.size, own.dt, own.cs);

    const double range = 1.35 * std::log(double(FLT_MAX)), steepest = 8.0;  // as decays.py has them
    bool any_strong = false;
    for (long h = 0; h < heads; h++) {
        const double total = own.cs[count - heads + h];
        own.strong[h] = total < -range;
        for (long i = h; i < count; i += heads) own.strong[h] |= own.dt[i] * p.A[h] < -steepest;
        any_strong |= own.strong[h];
        // The G of a strong head is H, and its S is H'.
        own.middle[h] = own.strong[h] ? 0 : total / 2;
        own.left[h] = own.strong[h] ? 0 : total - own.middle[h];
    }
    for (long i = 0; i < count; i += heads)
        for (long h = 0; h < heads; h++) own.from_middle[i + h] = own.cs[i + h] - own.middle[h];
    for (long i = 0; i < count; i += LANES) {
        const vec decay = exp(load(own.from_middle + i));
        store(own.read_by + i, decay);
        store(own.write_dt + i, load(own.dt + i) / decay);
    }
    if (any_strong)
        for (long i = 0; i < count; i++)
            if (own.strong[i % heads]) own.read_by[i] = own.write_dt[i] = 0;
}

// The gradients of what a thread's heads were given for step sizes, of A and of dt_bias. For a strong head along_x and
// along_y are what pairwise.hpp left there: the gradients of step sizes and of log-decays.
template <typename Element>
void give_back_decays(const Call& p, const Chunk& chunk, const Worker& w, long first_head, long last_head) {
    const Own& own = w.own();
    const RowsOf<Element> ddt = chunk.rows<Element>(p.ddt);
    for (long h = first_head; h < last_head; h++) {
        // The log-decay of a token is in every sum that is not before it, and in what passes the state on. These sums
        // cancel to a large part, hence float64.
        double from_here = own.along_states[h], dA = 0, dbias = 0;
        for (long t = chunk.size - 1; t >= 0; t--) {
            const long i = t * p.heads + h;
            float gradient = own.along_x[i], dlog_decay = own.along_y[i];
            if (!own.strong[h]) {
                gradient /= own.read_by[i];
                from_here += dlog_decay - gradient * own.dt[i];
                dlog_decay = from_here;
            }
            dA += dlog_decay * own.dt[i];
            gradient += dlog_decay * p.A[h];
            if (p.dt_bias) gradient *= own.dt_slope[i];
            dbias += gradient;
            store_number(ddt[t] + h, gradient);
        }
        Sums(p, own.sums).A[h] = dA;
        if (p.dt_bias) Sums(p, own.sums).dt_bias[h] = dbias;
    }
}

// A sample's state as the caller has it, [channel][d_state], or null for zero, to and from a panel of it,
// [d_state][64].
void read_panel(const Call& p, long sample, long panel, const float* states, float* to) {
    if (!states) {
        std::memset(to, 0, sizeof(float) * p.d_state * PANEL);
        return;
    }
    const float* state = states + (sample * p.heads * p.headdim + PANEL * panel) * p.d_state;
    for (long i = 0; i < p.d_state; i++)
        for (long c = 0; c < PANEL; c++) to[i * PANEL + c] = state[c * p.d_state + i];
}
void write_panel(const Call& p, long sample, long panel, const float* from, float* states) {
    float* state = states + (sample * p.heads * p.headdim + PANEL * panel) * p.d_state;
    for (long c = 0; c < PANEL; c++)
        for (long i = 0; i < p.d_state; i++) state[c * p.d_state + i] = from[i * PANEL + c];
}

// to = from, times what is left of it on the way into the next chunk; [d_state][64] of one panel.
void enter(const Call& p, const Own& own, long panel, const float* from, float* to) {
    for (long c = 0; c < PANEL; c += 16) {
        const long head = (PANEL * panel + c) / p.headdim;
        const float factor = own.enter[head], rest = own.enter_rest[head];
        for (long i = 0; i < p.d_state; i++)
            for (long v = c; v < c + 16; v += LANES)
                store(to + i * PANEL + v, load(from + i * PANEL + v) * factor * rest);
    }
}

}  // namespace

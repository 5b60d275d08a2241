// A Mamba-2 mixer between its two projections, or its scan alone, forward and backward. All is computed in float32;
// what a mixer reads and writes may be bfloat16 (Element).
//
// A sample goes through chunk by chunk, in scan order; whatever a chunk leaves for the next step of the work stays in
// the cache. Tokens of a chunk are kept in scan order: only reading and writing the caller's tensors knows where they
// stand. The mathematics and the names are those of chunked.py:
//
//     Y = exp(cs - c) * ([C | M] @ [G; X'])     with M = C B^T, masked, and X' = exp(c - cs) dt x
//     S = G + B^T X'
//     G' = exp(...) S                           of the next chunk
//
// All channels of x, head after head, are cut into panels of 64 columns: there are a multiple of 64. A panel of rows,
// [row][64], is what products read and write: it fits the innermost cache, and a head is never cut. Threads share the
// samples, or, where these are fewer, the channels, panels and tokens of a chunk.

#include <vector>

#include "backward.hpp"

namespace {

long threads_of(const Call& p) {
#if defined(_OPENMP)
    return p.threads;
#else
    return 1;
#endif
}

bool by_sample(const Call& p) {
    return p.batch >= threads_of(p);
}

// Memory that the caller lends, cut up for all threads: each has a sample of its own, or all of them one together.
struct Scratch {
    std::vector<Shared> shareds;
    std::vector<Own> owns;
    float* sums = nullptr;   // (threads, all of Sums)
    float *conv_weight, *D;  // as the kernels read them
    long size;

    Scratch(const Call& p, bool backward, float* at) {
        const Sizes s(p);
        Arena arena{at};
        for (long i = 0; i < threads_of(p); i++) {
            shareds.push_back(by_sample(p) || i == 0 ? take_shared(arena, p, backward) : Shared{});
            owns.push_back(take_own(arena, p, backward));
        }
        if (backward) sums = arena.take(threads_of(p) * Sums(p, nullptr).count);
        conv_weight = arena.take(p.taps * s.conv_dim);
        D = arena.take(s.width);
        size = arena.used;
    }
};

// The call with its parameters as the kernels read them.
Call read_parameters(const Call& given, const Scratch& scratch) {
    const Sizes s(given);
    Call p = given;
    for (long k = 0; k < p.taps; k++)
        for (long c = 0; c < s.conv_dim; c++)
            scratch.conv_weight[k * s.conv_dim + c] = given.conv_weight[c * p.taps + k];
    p.conv_weight = scratch.conv_weight;
    if (!given.D) return p;
    for (long c = 0; c < s.width; c++) scratch.D[c] = given.D[c / p.headdim];
    p.D = scratch.D;
    return p;
}

// The gradients of parameters, from what all threads have found.
void write_gradients(const Call& p, float* sums) {
    const Sizes s(p);
    const Sums found(p, sums);
    for (long thread = 1; thread < threads_of(p); thread++)
        for (long i = 0; i < found.count; i++) sums[i] += sums[thread * found.count + i];
    std::copy_n(found.A, p.heads, p.dA);
    if (p.dt_bias) std::copy_n(found.dt_bias, p.heads, p.ddt_bias);
    if (p.taps) std::copy_n(found.conv_bias, s.conv_dim, p.dconv_bias);
    for (long k = 0; k < p.taps; k++)
        for (long c = 0; c < s.conv_dim; c++) p.dconv_weight[c * p.taps + k] = found.conv_weight[k * s.conv_dim + c];
    if (!p.D) return;
    std::copy_n(found.norm_weight, s.width, p.dnorm_weight);
    for (long h = 0; h < p.heads; h++) {
        p.dD[h] = 0;
        for (long c = h * p.headdim; c < (h + 1) * p.headdim; c++) p.dD[h] += found.D[c];
    }
}

void run(const Call& given, bool backward, float* memory) {
    static_assert(PANEL % LANES == 0 && 16 % LANES == 0);
    const Scratch scratch(given, backward, memory);
    const Call p = read_parameters(given, scratch);
    const long parameters = Sums(p, nullptr).count;
    if (backward) std::fill_n(scratch.sums, threads_of(p) * parameters, 0.0f);
    const auto forward = p.in_bfloat16 ? forward_sample<bfloat16> : forward_sample<float>;
    const auto back = p.in_bfloat16 ? backward_sample<bfloat16> : backward_sample<float>;
    const auto work = backward ? back : forward;
#if defined(_OPENMP)
#pragma omp parallel num_threads(p.threads)
#endif
    {
        long number = 0, all = 1;
#if defined(_OPENMP)
        number = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        float* sums = backward ? scratch.sums + number * parameters : nullptr;
        if (by_sample(p)) {
            const Worker alone{0, 1, sums, scratch.shareds[number], &scratch.owns[number]};
            for (long sample = number; sample < p.batch; sample += all) work(p, sample, alone);
        } else {
            const Worker together{number, all, sums, scratch.shareds[0], scratch.owns.data()};
            for (long sample = 0; sample < p.batch; sample++) work(p, sample, together);
        }
    }
    if (backward) write_gradients(p, scratch.sums);
}

}  // namespace

extern "C" {

int64_t patchscale_call_bytes() {
    return sizeof(Call);
}

// Floats that a call needs as scratch; nothing is read of the call but its sizes and what it has.
int64_t patchscale_scratch(const Call* call, int64_t backward) {
    return Scratch(*call, backward, nullptr).size;
}

void patchscale_forward(const Call* call, float* scratch) {
    run(*call, false, scratch);
}

void patchscale_backward(const Call* call, float* scratch) {
    run(*call, true, scratch);
}
}

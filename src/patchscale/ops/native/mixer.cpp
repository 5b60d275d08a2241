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

void run(const Call& p, bool backward) {
    static_assert(PANEL % LANES == 0 && 16 % LANES == 0);
    std::vector<Shared> shareds(threads_of(p));
    std::vector<Own> owns(threads_of(p));
    lay_out(p, backward, p.scratch, shareds.data(), owns.data());
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
        if (by_sample(p)) {
            const Worker alone{0, 1, number, shareds[number], &owns[number]};
            for (long sample = number; sample < p.batch; sample += all) work(p, sample, alone);
        } else {
            const Worker together{number, all, number, shareds[0], owns.data()};
            for (long sample = 0; sample < p.batch; sample++) work(p, sample, together);
        }
    }
}

}  // namespace

extern "C" {

int64_t patchscale_call_bytes() {
    return sizeof(Call);
}

// Floats that a call needs as scratch; nothing is read of the call but its sizes.
int64_t patchscale_scratch(const Call* call, int64_t backward) {
    return lay_out(*call, backward, nullptr, nullptr, nullptr);
}

void patchscale_forward(const Call* call) {
    run(*call, false);
}

void patchscale_backward(const Call* call) {
    run(*call, true);
}
}

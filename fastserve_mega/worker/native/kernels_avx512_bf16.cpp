// For x86 with AVX-512 and its instructions for bfloat16 and for bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "stage.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#define FMA_512
#define BF16_INSTRUCTIONS

namespace fastserve {
namespace {

constexpr int LANES = 16, MAX_ROWS = 12;

#include "kernels.inl"

}  // namespace

Kernels avx512_bf16_kernels() { return kernels_of<Bfloat16>(); }

}  // namespace fastserve
#pragma GCC pop_options
#endif

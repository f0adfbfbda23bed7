// For x86 with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "stage.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define FMA_512

namespace fastserve {
namespace {

constexpr int LANES = 16, MAX_ROWS = 12;

#include "kernels.inl"

}  // namespace

Kernels avx512_kernels(DType dtype) {
  return dtype == BFLOAT16 ? kernels_of<Bfloat16>() : kernels_of<float>();
}

}  // namespace fastserve
#pragma GCC pop_options
#endif

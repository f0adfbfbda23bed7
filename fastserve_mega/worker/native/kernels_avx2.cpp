// For x86 with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "stage.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FMA_256

namespace fastserve {
namespace {

constexpr int LANES = 8, MAX_ROWS = 6;

#include "kernels.inl"

}  // namespace

Kernels avx2_kernels(DType dtype) {
  return dtype == BFLOAT16 ? kernels_of<Bfloat16>() : kernels_of<float>();
}

}  // namespace fastserve
#pragma GCC pop_options
#endif

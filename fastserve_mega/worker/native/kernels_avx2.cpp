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
  return Kernels{dtype == BFLOAT16 ? run_stage<Bfloat16> : run_stage<float>, find_largest, MAX_ROWS};
}

}  // namespace fastserve
#pragma GCC pop_options
#endif

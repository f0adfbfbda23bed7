// For any machine: four lanes, without instructions of their own for anything.
#include <cmath>
#include <cstring>

#include "stage.h"


namespace fastserve {
namespace {

constexpr int LANES = 4, MAX_ROWS = 4;

#include "kernels.inl"

}  // namespace

Kernels portable_kernels(DType dtype) {
  return Kernels{dtype == BFLOAT16 ? run_stage<Bfloat16> : run_stage<float>, find_largest, MAX_ROWS};
}

}  // namespace fastserve

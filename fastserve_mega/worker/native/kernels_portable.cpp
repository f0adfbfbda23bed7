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
  return dtype == BFLOAT16 ? kernels_of<Bfloat16>() : kernels_of<float>();
}

}  // namespace fastserve

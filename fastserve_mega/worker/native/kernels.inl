// Everything that is compiled once per instruction set, in the right order. The file that includes
// this has included the standard headers before it named its instruction set: an inline function of
// a header must not be compiled for more than the machine may have.
#include "vectors.inl"
#include "rows.inl"
#include "bytes.inl"
#include "matrices.inl"
#include "attention.inl"
#include "placing.inl"
#include "entering.inl"
#include "run.inl"
#include "sampling.inl"

template <class T>
static Kernels kernels_of() {
  return Kernels{run_stage<T>, pack_bytes<T>, find_largest, MAX_ROWS};
}

// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include "../rmsnorm.h"
#include "plan.h"

namespace rmsnorm::cuda {

// Streaming multiprocessors of the current device; 0: there is none that answers.
int multiprocessors();

// Rows in double, for any dtypes: slow.cu.
int forward_in_double(const RmsNormForward& p, cudaStream_t stream);
int64_t backward_in_double_workspace(const RmsNormBackward& p);
int backward_in_double(const RmsNormBackward& p, cudaStream_t stream);

// The result is that of this launch alone: an earlier error that nobody asked for yet is left to its owner, and
// one of ours is not left to others.
template <typename Args>
int launch(void (*kernel)(Args), dim3 blocks, int threads, const Args& args, cudaStream_t stream) {
  void* params[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, threads, params, 0, stream);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Do all rows start where a chunk of `elems` elements can be accessed with the widest instruction? (16 bytes at
// most; the chunks of a row are as far apart as they are long.)
inline bool rows_aligned(const void* p, const Rows& rows, int64_t count, DType dtype, int elems) {
  const int64_t bytes = elems * size_of(dtype) < 16 ? elems * size_of(dtype) : 16;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  for (int d = 0; d < rows.ndim; ++d) {
    if ((rows.ndim == 1 ? count : rows.size[d]) > 1 && rows.stride[d] * size_of(dtype) % bytes != 0) return false;
  }
  return true;
}

inline bool row_aligned(const void* p, DType dtype, int elems) {
  return rows_aligned(p, Rows{1, {}, {}}, 1, dtype, elems);
}

}  // namespace rmsnorm::cuda

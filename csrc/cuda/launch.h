// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include "../rmsnorm.h"
#include "plan.h"

namespace rmsnorm::cuda {

// The current device; multiprocessors is 0 if there is none that answers.
Device device();

// The cudaError_t by which device() found none: the driver may be too old.
int why_no_device();

// Rows in double, for any dtypes, and sums of any dtypes: double.cu.
int add_any(const RmsNormForward& p, cudaStream_t stream);
int forward_in_double(const RmsNormForward& p, cudaStream_t stream);
int64_t backward_in_double_workspace(const RmsNormBackward& p);
int backward_in_double(const RmsNormBackward& p, cudaStream_t stream);

struct Shape {
  dim3 blocks;
  int threads;
  int cluster = 1;
  int64_t shared_bytes = 0;
};

// Are kernels launched so that they may overlap with the one ahead of them (programmatic dependent
// launch)?
bool overlapping();

// The result is that of this launch alone: an earlier error that nobody asked for yet is left to
// its owner, and one of ours is not left to others.
template <typename Args>
int launch(void (*kernel)(Args), const Shape& shape, const Args& args, cudaStream_t stream) {
  const auto function = reinterpret_cast<const void*>(kernel);
  const auto shared_bytes = static_cast<unsigned>(shape.shared_bytes);
  // A kernel that wants more, its static arrays included, has to say so.
  constexpr unsigned kFreeSharedBytes = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes + kOtherSharedBytes >
      kFreeSharedBytes) {  // all that a plan may ask for: other threads set it too
    const auto limit = static_cast<int>(device().shared_bytes - kOtherSharedBytes);
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (overlapping()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  void* params[] = {const_cast<Args*>(&args)};
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, function, params);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// For last_plan(), of this thread. A launch that fails is told too.
void set_last_plan(const Plan& plan);

template <typename Args>
int launch(void (*kernel)(Args), const Plan& plan, const Args& args, cudaStream_t stream) {
  set_last_plan(plan);
  const Shape shape{static_cast<unsigned>(plan.blocks), plan.threads, plan.cluster,
                    plan.shared_bytes};
  return launch(kernel, shape, args, stream);
}

// Do all rows start where a chunk of `elems` elements can be accessed with the widest instruction?
// (16 bytes at most; the chunks of a row are as far apart as they are long.)
inline bool rows_aligned(const void* p, const Rows& rows, int64_t count, DType dtype, int elems) {
  const int64_t bytes = elems * size_of(dtype) < 16 ? elems * size_of(dtype) : 16;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  for (int d = 0; d < rows.ndim; ++d) {
    if ((rows.ndim == 1 ? count : rows.size[d]) > 1 && rows.stride[d] * size_of(dtype) % bytes != 0)
      return false;
  }
  return true;
}

inline bool row_aligned(const void* p, DType dtype, int elems) {
  return rows_aligned(p, Rows{1, {}, {}}, 1, dtype, elems);
}

}  // namespace rmsnorm::cuda

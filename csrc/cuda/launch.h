// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include "plan.h"
#include "vec.cuh"

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

// Are kernels launched so that they may overlap with the one ahead of them (programmatic dependent
// launch)?
bool overlapping();

// The result is that of this launch alone: an earlier error that nobody asked for yet is left to
// its owner, and one of ours is not left to others.
template <typename Args>
int launch(void (*kernel)(Args), dim3 blocks, int threads, const Args& args, cudaStream_t stream,
           unsigned shared_bytes = 0, unsigned cluster_blocks = 1) {
  const auto function = reinterpret_cast<const void*>(kernel);
  // A kernel that wants more, its static arrays included, has to say so.
  constexpr unsigned kFreeSharedBytes = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes + kOtherSharedBytes > kFreeSharedBytes) {
    // All that a plan may ask for: other threads set it too.
    const auto limit = static_cast<int>(device().shared_bytes - kOtherSharedBytes);
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{
      blocks, static_cast<unsigned>(threads), shared_bytes, stream, attributes, 0};
  if (cluster_blocks > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {cluster_blocks, 1, 1};
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
  return launch(kernel, static_cast<unsigned>(plan.blocks), plan.threads, args, stream,
                static_cast<unsigned>(plan.shared_bytes), plan.cluster);
}

// A tensor of p.rows rows for a kernel that takes as many elements at a time as 16 bytes of x hold.
// Aligned: all of these chunks start where the widest instruction can access them (16 bytes at
// most; the chunks of a row are as far apart as they are long).
template <typename P>
View view_of(const P& p, const void* data, DType dtype, const Rows& rows) {
  const int64_t size = size_of(dtype);
  const int64_t bytes = std::min(vector_elems(p.x_dtype) * size, int64_t{16});
  bool aligned = reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (int d = 0; d < rows.ndim; ++d) {
    const bool is_one = (rows.ndim == 1 ? p.rows : rows.size[d]) <= 1;
    aligned = aligned && (is_one || rows.stride[d] * size % bytes == 0);
  }
  return {data, dtype, aligned, rows};
}

// Where there is no weight, there is none that differs from x.
template <typename P>
DType weight_dtype(const P& p) {
  return p.weight != nullptr ? p.w_dtype : p.x_dtype;
}

// What the kernels of rows have in common.
struct RowArgs {
  View x, weight;
  int64_t rows, cols;
  double eps;
  float weight_offset;
  int lanes, cluster;  // of the plan
  int64_t slice;
};

template <typename P>
RowArgs row_args(const P& p, const Plan& plan) {
  const View x = view_of(p, p.x, p.x_dtype, p.x_rows);
  const View weight = view_of(p, p.weight, weight_dtype(p), Rows{1, {}, {0}});
  const float offset = p.weight != nullptr ? static_cast<float>(p.weight_offset) : 0.0f;
  return {x, weight, p.rows, p.cols, p.eps, offset, plan.lanes, plan.cluster, plan.slice};
}

// f(T()) with T the type in which a tensor of dtype `other` is held beside x, of type X and dtype
// x: held_dtype in plan.h.
template <typename X, typename F>
int with_held_type(X, DType x, DType other, const F& f) {
  return held_dtype(x, other) == x ? f(X()) : f(float());
}

// f(std::true_type()) or f(std::false_type()).
template <typename F>
int with_flag(bool flag, const F& f) {
  return flag ? f(std::true_type()) : f(std::false_type());
}

}  // namespace rmsnorm::cuda

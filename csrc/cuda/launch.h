// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <limits>

#include "../weight_offset.h"
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
int forward_in_double(const RmsNormRope& p, cudaStream_t stream);
int backward_in_double(const RmsNormRopeBackward& p, cudaStream_t stream);
int forward_in_double(const RmsNormGated& p, cudaStream_t stream);
int64_t backward_in_double_workspace(const RmsNormGatedBackward& p);
int backward_in_double(const RmsNormGatedBackward& p, cudaStream_t stream);
int forward_in_double(const RmsNormSandwich& p, cudaStream_t stream);

// Are kernels launched so that they may overlap with the one ahead of them (programmatic dependent
// launch)?
bool overlapping();

// Lets a kernel ask for all shared memory that a plan may: other threads do so too. What this
// thread has told the current device is not told again, which would cost a microsecond.
int allow_shared_bytes(const void* function);

// The result is that of this launch alone: an earlier error that nobody asked for yet is left to
// its owner, and one of ours is not left to others.
template <typename Args>
int launch(void (*kernel)(Args), dim3 blocks, dim3 threads, const Args& args, cudaStream_t stream,
           unsigned shared_bytes = 0, unsigned cluster_blocks = 1) {
  const auto function = reinterpret_cast<const void*>(kernel);
  // A kernel that wants more, its static arrays included, has to say so.
  constexpr unsigned kFreeSharedBytes = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes + kOtherSharedBytes > kFreeSharedBytes) {
    error = static_cast<cudaError_t>(allow_shared_bytes(function));
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{blocks, threads, shared_bytes, stream, attributes, 0};
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
  const dim3 threads(plan.lanes, plan.threads / plan.lanes);  // of a row, by rows
  return launch(kernel, static_cast<unsigned>(plan.blocks), threads, args, stream,
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

// Are y and rstd of another sum than x is?
RMSNORM_HOST_DEVICE inline bool is_unrounded(const RmsNormForward& p) {
  return p.addends.input != nullptr && p.addends.unrounded &&
         (p.x_dtype == DType::kFloat16 || p.x_dtype == DType::kBFloat16);
}

// Which launches a kernel is for. Plain ones have x and all results of x's type, evenly spaced rows
// of whole aligned chunks, and any weight; kPlainCast is that with cast_before_weight. kAny takes
// every launch.
enum class Form { kPlain, kPlainCast, kAny };

// eps, and what would be computed from it and the columns ahead of every row.
struct Epsilon {
  double value, root, cols;
};

// What the kernels of rows have in common.
struct RowArgs {
  View x, weight;
  int64_t rows, cols, weight_cols;  // weight_cols: 0 if there is no weight
  Epsilon eps;
  float weight_offset;
  bool cast_before_weight;
  int lanes, cluster;  // of the plan
  int64_t slice;
};

// All but what follows from a plan.
template <typename P>
RowArgs row_args(const P& p) {
  RowArgs a{view_of(p, p.x, p.x_dtype, p.x_rows),
            view_of(p, p.weight, weight_dtype(p), Rows{1, {}, {0}})};
  a.rows = p.rows;
  a.cols = p.cols;
  a.weight_cols = p.weight != nullptr ? p.cols : 0;
  a.eps = {p.eps, std::sqrt(p.eps), static_cast<double>(p.cols)};
  // An absent weight is 0 + 1.
  a.weight_offset = p.weight == nullptr ? 1.0f : static_cast<float>(addend_of(p.weight_offset));
  a.cast_before_weight = p.cast_before_weight;
  return a;
}

inline void lay_out(RowArgs& a, const Plan& plan) {
  a.lanes = plan.lanes;
  a.cluster = plan.cluster;
  a.slice = plan.slice;
}

// Are these, of which some may be absent, what a plain kernel takes beside x?
template <typename... Views>
bool is_plain(const RowArgs& a, const Views&... views) {
  const auto fits = [&](const View& v) {
    return v.data == nullptr || (v.aligned && v.rows.ndim == 1 && v.dtype == a.x.dtype);
  };
  return a.rows <= std::numeric_limits<int32_t>::max() && a.cols % vector_elems(a.x.dtype) == 0 &&
         (a.weight.data == nullptr || a.weight.aligned) && (fits(a.x) && ... && fits(views));
}

// f(std::integral_constant of the Form of a launch).
template <typename F>
int with_form(bool plain, bool cast, const F& f) {
  if (!plain) return f(std::integral_constant<Form, Form::kAny>());
  if (cast) return f(std::integral_constant<Form, Form::kPlainCast>());
  return f(std::integral_constant<Form, Form::kPlain>());
}

// The weight from column `begin` on in fp32, its offset added, to the chunks that each(f) calls
// f(k, column, count) for.
template <bool kPlain, int kElems, typename Each, int kChunks>
__device__ void load_weights(const RowArgs& a, int64_t begin, const Each& each,
                             Chunk<float, kElems> (&w)[kChunks]) {
  // All rows of a weight are one: any will do, whose address is computed. What is read from the
  // arguments ptxas reads once more for each chunk, and these reads share a scoreboard with the
  // loads: the last would wait for the first.
  View weight = a.weight;
  weight.data = static_cast<const char*>(weight.data) + blockIdx.x * weight.rows.stride[0];
  asm volatile("" : "+l"(weight.data));
  with_type(weight.dtype, [&](auto element) {
    using W = decltype(element);
    each([&](int k, auto col, int) {
      using Index = decltype(col);
      const Index left = static_cast<Index>(a.weight_cols - begin) - col;
      const int count = static_cast<int>(min(left, Index{kElems}));
      const auto packed = load_chunk<kPlain, W, kElems>(weight, begin, col, count);
      unrolled<kElems / 2>([&](int i) { w[k].set(i, packed.get(i) + a.weight_offset); });
    });
  });
}

// The most calls of one launch: q and k.
constexpr int kMostSides = 2;

// f(std::true_type()) or f(std::false_type()).
template <typename F>
int with_flag(bool flag, const F& f) {
  return flag ? f(std::true_type()) : f(std::false_type());
}

}  // namespace rmsnorm::cuda

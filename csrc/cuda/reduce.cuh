// Sums over a row, and 1 / RMS from them.
#pragma once
#include <cooperative_groups.h>

#include <cfloat>
#include <cstdint>

#include "launch.h"
#include "tuning.h"
#include "vec.cuh"

namespace rmsnorm::cuda {

// A sum with what its additions rounded off beside it (two-sum). Plain fp32 sums are too coarse for
// fp32 results: the last levels of any tree are a few additions each of whose errors reaches y, and
// together they reach an ulp.
struct alignas(8) Sum {
  float hi = 0, lo = 0;

  Sum() = default;
  __device__ explicit Sum(float hi, float lo = 0) : hi(hi), lo(lo) {}
  __device__ operator float() const { return isfinite(hi) ? hi + lo : hi; }

  static __device__ Sum of_square(float v) {
    const float square = __fmul_rn(v, v);
    return Sum(square, __fmaf_rn(v, v, -square));
  }
};

__device__ inline Sum operator+(Sum a, Sum b) {
  const float hi = a.hi + b.hi;
  const float part = hi - a.hi;
  return Sum(hi, a.lo + b.lo + ((a.hi - (hi - part)) + (b.hi - part)));
}

// leaf(0) + .. + leaf(kLeaves - 1) as a balanced tree, of floats or Sums.
template <int kLeaves, typename F>
__device__ auto tree_sum(const F& leaf, int first = 0) {
  if constexpr (kLeaves == 1) {
    return leaf(first);
  } else {
    return tree_sum<kLeaves / 2>(leaf, first) + tree_sum<kLeaves / 2>(leaf, first + kLeaves / 2);
  }
}

// The blocks that share a row, each with a slice of its columns; most often one. A kernel that is
// compiled for a device without clusters has no more.
struct Cluster {
  int size, rank;

  __device__ explicit Cluster(int size) : size(size), rank(blockIdx.x % size) {
    // Every block has to be there before another one writes into its memory: see row_sum. That
    // orders no memory, so it waits for none.
    if (size > 1) arrive_relaxed();
  }

#if __CUDA_ARCH__ >= 900
  static __device__ void arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  }
  static __device__ void arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
  static __device__ void wait() { cooperative_groups::cluster_group::barrier_wait(); }
  template <typename T>
  static __device__ T* of_block(T* shared, int rank) {
    return cooperative_groups::cluster_group::map_shared_rank(shared, rank);
  }
#else
  static __device__ void arrive_relaxed() {}
  static __device__ void arrive() {}
  static __device__ void wait() {}
  template <typename T>
  static __device__ T* of_block(T* shared, int) {
    return shared;
  }
#endif

  // Of all threads of the row.
  __device__ void barrier() const {
    if (size > 1) {
      arrive();
      wait();
    } else {
      __syncthreads();
    }
  }
};

// In which the sum of a row of X is formed. 16-bit results do not show what fp32 rounds off in the
// few additions of a tree; what a thread sums up over a long row is a Sum for both.
template <typename X>
using Total = std::conditional_t<sizeof(X) == 4, Sum, float>;

__device__ inline float of_lane(float v, int distance) { return __shfl_xor_sync(~0u, v, distance); }
__device__ inline Sum of_lane(const Sum& s, int distance) {
  return Sum(of_lane(s.hi, distance), of_lane(s.lo, distance));
}

// The threads of a block are blockDim.x for a row and blockDim.y rows. The one's place in its warp.
__device__ inline int warp_lane() { return (threadIdx.y * blockDim.x + threadIdx.x) % kWarp; }

template <int kLanes, typename T>
__device__ T sum_of_lanes(T v) {
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) v = v + of_lane(v, o);
  return v;
}

// The sum over groups of at most a warp, in every lane.
template <typename T>
__device__ T sum_of_group(T v, int lanes) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) {
    if (o < lanes) v = v + of_lane(v, o);
  }
  return v;
}

// One partial sum per warp of a row; alternate halves by `turn`, so that one barrier per row is
// enough.
template <int kWarps>
__device__ void* warp_sums(int turn) {
  __shared__ float2 sums[2][kWarps];
  return sums[turn % 2];
}

// The sums over the lanes of each row, in every one of them; all threads of the block take part.
// `turn` counts the calls. Rows that are taken several at a time are no longer than a warp
// (plan.h).
template <int kThreads, typename T, int kRows>
__device__ void row_sum(T (&v)[kRows], int turn) {
  const int lanes = blockDim.x;
  if constexpr (kRows > 1) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) {
      if (o < lanes) unrolled<kRows>([&](int r) { v[r] = v[r] + of_lane(v[r], o); });
    }
  } else {
    constexpr int kWarps = kThreads / kWarp;
    v[0] = sum_of_lanes<kWarp>(v[0]);
    if (lanes == kWarp) return;
    const int warps = lanes / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    T* const sums = static_cast<T*>(warp_sums<kWarps>(turn)) + threadIdx.y * warps;
    if (lane == 0) sums[warp] = v[0];
    __syncthreads();
    v[0] = lane % kWarps < warps ? sums[lane % kWarps] : T{};
    v[0] = sum_of_lanes<kWarps>(v[0]);
  }
}

// The sum over the threads of all blocks that share a row, in every one of them.
template <typename T>
__device__ void row_sum(T& v, const Cluster& cluster, int turn) {
  constexpr int kWarps = kThreads<kBackwardSharedRows> / kWarp;  // the most of all kernels
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* const sums = static_cast<T*>(warp_sums<kTuned.max_cluster * kWarps>(turn));
  v = sum_of_lanes<kWarp>(v);
  if (cluster.size > 1) {
    if (turn == 0) Cluster::wait();
    if (lane < cluster.size) *Cluster::of_block(sums + cluster.rank * warps + warp, lane) = v;
  } else if (lane == 0) {
    sums[warp] = v;
  }
  cluster.barrier();
  v = T{};
  for (int i = lane; i < cluster.size * warps; i += kWarp) v = v + sums[i];
  v = sum_of_lanes<kWarp>(v);
}

// 1 / sqrt(mean(x^2) + eps) = pre * (hi + lo). pre is a power of two, and 1 but for rows that are
// rescued.
struct Scale {
  float hi, lo, pre;
};

// 1 / cols and eps, each as the sum of two floats.
struct Mean {
  float inv_hi, inv_lo, eps_hi, eps_lo;
};

inline Mean mean_of(int64_t cols, double eps) {
  const double inv = 1.0 / static_cast<double>(cols);
  // A huge eps becomes infinite here and leads to the rescue, where it is a double.
  const float inv_hi = static_cast<float>(inv), eps_hi = static_cast<float>(eps);
  return {inv_hi, static_cast<float>(inv - inv_hi), eps_hi, static_cast<float>(eps - eps_hi)};
}

// Mean squares in this range neither overflow nor lose bits in fp32 on any way through the kernels:
// rstd is between kMinFastRstd and kMaxFastRstd. Other rows are rescued.
constexpr float kMinMeanSquare = 0x1p-60f, kMaxMeanSquare = 0x1p60f;

// The hardware's estimate, of a normal number.
__device__ inline float reciprocal_root(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// From the sum of squares, to about 2^-44: the error of the result is that of the sum. All in fp32,
// because fp64 runs at 1/64 of its rate on most GPUs and this is done once for as few as 64
// elements. Returns false for a row out of range. (NaN is in: it comes out as NaN.)
__device__ inline bool fast_scale(const Sum& sum, const Mean& m, Scale& out) {
  const float mean = __fmul_rn(sum.hi, m.inv_hi);
  const float rough = mean + m.eps_hi;
  if (rough < kMinMeanSquare || rough > kMaxMeanSquare) return false;
  const float part = rough - mean;
  const float rest = (mean - (rough - part)) + (m.eps_hi - part) + m.eps_lo;
  const float v_lo =
      __fmaf_rn(sum.hi, m.inv_lo, __fmaf_rn(sum.hi, m.inv_hi, -mean)) + sum.lo * m.inv_hi + rest;
  // One Newton step on the hardware's estimate: e = 1 - v * r^2, with r^2 as the sum of two floats.
  const float r = reciprocal_root(rough);
  const float sq = __fmul_rn(r, r);
  const float sq_lo = __fmaf_rn(r, r, -sq);
  const float e = __fmaf_rn(-rough, sq, 1.0f) - __fmaf_rn(rough, sq_lo, __fmul_rn(v_lo, sq));
  const float step = __fmul_rn(0.5f, __fmul_rn(r, e));
  out.hi = r + step;
  out.lo = step - (out.hi - r);
  out.pre = 1.0f;
  return true;
}

// The same of a plain sum, to a few units in the last place.
__device__ inline bool fast_scale(float sum, const Mean& m, Scale& out) {
  const float v = __fmaf_rn(sum, m.inv_hi, m.eps_hi);
  if (v < kMinMeanSquare || v > kMaxMeanSquare) return false;
  const float r = reciprocal_root(v);
  out = {__fmaf_rn(0.5f * r, __fmaf_rn(-v * r, r, 1.0f), r), 0.0f, 1.0f};
  return true;
}

__device__ inline double pow2(int e) { return __hiloint2double((e + 1023) << 20, 0); }

// 1 / sqrt(mean(x^2) + eps) = r * 2^exponent, in double, for x of any magnitude: x is scaled so
// that the greatest of |x| and sqrt(eps) is near 1, and eps with it.
struct DoubleScale {
  double r;
  int exponent;
};

// The lanes of the warp that are in this one's group of so many, a power of two.
__device__ inline uint32_t group_mask(int group) {
  return ~0u >> (kWarp - group) << (warp_lane() & -group);
}

// A sum of products. What an addition rounds off goes into the next term (Kahan).
struct DoubleSum {
  double sum = 0, rest = 0;
  __device__ void add(double a, double b) {
    const double term = fma(a, b, rest), next = sum + term;
    rest = isfinite(next) ? term - (next - sum) : 0;
    sum = next;
  }
};

// load(i): element i of the row, as double. The `group` lanes of a warp that call this share the
// work, and each gets the result. Far off the hot path: it reads the row twice.
template <typename Load>
__device__ DoubleScale double_scale(const Load& load, int64_t cols, const Epsilon& eps, int group) {
  const int lane = warp_lane() % group;
  const uint32_t mask = group_mask(group);
  double top = eps.root;
#pragma unroll 1
  for (int64_t i = lane; i < cols; i += group) top = fmax(top, fabs(load(i)));
#pragma unroll 1
  for (int o = group / 2; o > 0; o /= 2) top = fmax(top, __shfl_xor_sync(mask, top, o));
  // 1000: so that both powers are normal numbers. An all-zero row and one with Inf stay as they
  // are.
  DoubleScale s;
  const int exponent = (__double2hiint(top) >> 20) - 1023;
  s.exponent = top > 0 && exponent < 1024 ? max(-1000, min(1000, -exponent)) : 0;
  const double pre = pow2(s.exponent);
  DoubleSum squares;
#pragma unroll 1
  for (int64_t i = lane; i < cols; i += group) {
    const double x = load(i) * pre;
    squares.add(x, x);
  }
  double sum = squares.sum;
#pragma unroll 1
  for (int o = group / 2; o > 0; o /= 2) sum += __shfl_xor_sync(mask, sum, o);
  s.r = 1.0 / sqrt(sum / eps.cols + eps.value * pre * pre);
  return s;
}

// The scale of a row out of the range of fast_scale. Each warp (or smaller group) of the row finds
// it by itself, from memory: load(i) is element i of what is normalized. For fp32 and narrower x,
// whose exponents fit pre and hi.
template <typename Load>
__device__ Scale rescued_scale_of(const Load& load, int64_t cols, const Epsilon& eps, int lanes) {
  const auto element = [&](int64_t i) { return static_cast<double>(load(i)); };
  const DoubleScale s = double_scale(element, cols, eps, min(lanes, 32));
  // Tiny x are made larger first. With huge x, most of the exponent goes to hi (2^-96: its lo is
  // still normal), or the small elements of such a row would become subnormal on the way.
  const int pre = s.exponent > 0 ? min(126, s.exponent) : max(-126, min(0, s.exponent + 96));
  const double r = s.r * pow2(s.exponent - pre);
  Scale out;
  out.pre = __uint_as_float((pre + 127) << 23);
  // Beyond fp32, but not infinite: only zeros and a tiny eps come to that, and have to stay zeros.
  out.hi = static_cast<float>(isfinite(r) ? fmin(r, double{FLT_MAX}) : r);
  out.lo = r <= FLT_MAX ? static_cast<float>(r - out.hi) : 0.0f;
  return out;
}
template <typename T>
__device__ Scale rescued_scale(const T* x, int64_t cols, const Epsilon& eps, int lanes) {
  return rescued_scale_of([=](int64_t i) { return static_cast<float>(x[i]); }, cols, eps, lanes);
}

}  // namespace rmsnorm::cuda

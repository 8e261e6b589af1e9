// From x to its scale and its norm: what forward.cu and quant.cu share.
#pragma once
#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rmsnorm::cuda {

struct NormArgs {
  View x, weight, input, residual;  // x = input + residual is formed first, if there is an input
  void* y;
  void* rstd;
  Rows x_rows, y_rows, input_rows, residual_rows;
  int64_t rows, cols;
  double eps;
  Mean mean;
  float weight_offset;
  int lanes, cluster;
  int64_t slice;
  DType y_dtype;
  bool y_aligned;
};

// Rows in 8 bits: quant.cu.
int launch_quant(const RmsNormForward& p, const NormArgs& args, const Plan& plan,
                 cudaStream_t stream);

// fp32 results carry the rounding error of a product along (three roundings would be 2 to 3 ulp):
// that of the weight and rstd, for then x may be subnormal. Where that product is beyond fp32, and
// in 16 bits, where no error shows, x comes first: x * rstd is never large.
template <typename X>
__device__ float scaled(float x, float g, const Scale& s) {
  const float plain = x * s.hi * g;
  if constexpr (sizeof(X) == 2) return plain;
  const float product = __fmul_rn(g, s.hi);
  const float rest = __fmaf_rn(g, s.lo, __fmaf_rn(g, s.hi, -product));
  return isfinite(product) ? __fmaf_rn(x, product, x * rest) : plain;
}

// x * rstd * g; with kCast x * rstd is rounded to X before.
template <typename X, bool kCast>
__device__ float2 normalized(float2 x, float2 g, const Scale& s) {
  const float2 v = {x.x * s.pre, x.y * s.pre};
  if constexpr (kCast) {
    float2 n = {v.x * s.hi, v.y * s.hi};
    if constexpr (sizeof(X) == 4) {
      n = {__fmaf_rn(v.x, s.hi, v.x * s.lo), __fmaf_rn(v.y, s.hi, v.y * s.lo)};
    }
    n = round_to<X>(n);
    return {n.x * g.x, n.y * g.y};
  } else {
    return {scaled<X>(v.x, g.x, s), scaled<X>(v.y, g.y, s)};
  }
}

// W is the type the weight is held in (held_dtype in plan.h). kAdd: x is a sum, of a residual and
// an input of type X or, where X is fp32, of any.
template <typename XType, typename WType, bool kAdd>
struct Norm {
  using X = XType;
  using W = WType;
  static constexpr bool kAdds = kAdd;
  static constexpr int kElems = 16 / sizeof(X);
  using XChunk = Chunk<X, kElems>;
  using WChunk = Chunk<W, kElems>;

  // Squares of 16-bit numbers are exact in fp32 (or nearly), and 16-bit results forgive the rest
  // within a thread.
  template <int kChunks>
  static __device__ Total<X> sum_of_squares(const XChunk (&x)[kChunks]) {
    const auto pair = [&](int i) { return x[i / (kElems / 2)].get(i % (kElems / 2)); };
    constexpr int kPairs = kChunks * kElems / 2;
    if constexpr (sizeof(X) == 4) {
      return tree_sum<kPairs>(
          [&](int i) { return Sum::of_square(pair(i).x) + Sum::of_square(pair(i).y); });
    } else {
      const auto square = [&](int i) {
        return __fmaf_rn(pair(i).y, pair(i).y, __fmul_rn(pair(i).x, pair(i).x));
      };
      return tree_sum<kPairs>(square);
    }
  }

  // One chunk of x, or of the residual beside one of the input.
  static __device__ XChunk load(const NormArgs& a, int64_t row, int64_t col, int count,
                                XChunk& input) {
    if constexpr (!kAdd) return load_chunk<X, kElems>(a.x, row_offset(a.x_rows, row) + col, count);
    input = load_chunk<X, kElems>(a.input, row_offset(a.input_rows, row) + col, count);
    return load_chunk<X, kElems>(a.residual, row_offset(a.residual_rows, row) + col, count);
  }

  // x as their sum; on its own, since a load does not go past a store.
  static __device__ void add(const NormArgs& a, int64_t row, int64_t col, int count,
                             const XChunk& input, XChunk& x) {
    if constexpr (kAdd) {
#pragma unroll
      for (int i = 0; i < kElems / 2; ++i) {
        const float2 left = input.get(i), right = x.get(i);
        x.set(i, {left.x + right.x, left.y + right.y});
      }
      X* const to = static_cast<X*>(const_cast<void*>(a.x.data)) + row_offset(a.x_rows, row) + col;
      store_chunk(to, x, count, a.x.aligned);
    }
  }

  // Once x is summed up and before y, which may be x, is written.
  static __device__ Scale scale(const NormArgs& a, const Total<X>& sum, int64_t row,
                                const Cluster& cluster, int lane) {
    Scale s;
    if (!fast_scale(sum, a.mean, s)) {
      // For what its other lanes wrote. Longer rows have had a barrier.
      if (kAdd && a.lanes <= 32) __syncwarp(group_mask(a.lanes));
      s = rescued_scale(static_cast<const X*>(a.x.data) + row_offset(a.x_rows, row), a.cols, a.eps,
                        a.lanes);
      // Its warps read all of the row, which is the block's only one.
      if (a.lanes > 32) cluster.barrier();
    }
    if (a.rstd != nullptr && lane == 0 && cluster.rank == 0) {
      static_cast<float*>(a.rstd)[row] = s.hi * s.pre;
    }
    return s;
  }
};

// The launch bounds of rows in registers. Short ones take few registers unasked.
template <KernelIndex kKernel, int kVectors>
constexpr int kRowsThreads =
    kVectors < kForwardVectors ? kTuned.forward_block_threads : kThreads<kKernel>;
template <KernelIndex kKernel, int kVectors, bool kMixed>
constexpr int kRowsBlocks = kVectors < kForwardVectors ? 1 : kBlocks<kKernel, kMixed>;
#define ROWS_BOUNDS(kernel, vectors, mixed) \
  __launch_bounds__((kRowsThreads<kernel, vectors>), (kRowsBlocks<kernel, vectors, (mixed)>))

// Loads the rows of a thread, or forms them, and sums up their squares.
template <typename N, typename Group, int kRows, int kVectors>
__device__ void load_rows(const NormArgs& a, const Group& group, int live,
                          typename N::XChunk (&x)[kRows][kVectors],
                          Total<typename N::X> (&sum)[kRows]) {
  typename N::XChunk input[kRows][kVectors] = {};
  group.each_row([&](int r, int64_t row) {
    group.each_chunk(
        [&](int k, int col, int count) { x[r][k] = N::load(a, row, col, count, input[r][k]); });
  });
  if constexpr (N::kAdds) {
    group.each_row([&](int r, int64_t row) {
      group.each_chunk(
          [&](int k, int col, int count) { N::add(a, row, col, count, input[r][k], x[r][k]); });
    });
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= live) break;
    sum[r] = N::sum_of_squares(x[r]);
  }
}

// Longer rows, a tile of kForwardVectors chunks per thread at a time. With kShared they are held in
// shared memory, by several blocks if need be. Without, they may be of any length and are read
// twice.
template <typename N, bool kShared>
struct LongRows : Slice<std::conditional_t<kShared, int, int64_t>, kForwardVectors, N::kElems> {
  using Index = std::conditional_t<kShared, int, int64_t>;  // of a chunk
  using Base = Slice<Index, kForwardVectors, N::kElems>;
  using Base::chunks, Base::column, Base::count, Base::each_chunk, Base::tile;
  using XChunk = typename N::XChunk;
  using WChunk = typename N::WChunk;
  const NormArgs& a;
  uint4* const kept;

  __device__ LongRows(const NormArgs& a, const Cluster& cluster, uint4* kept)
      : Base{cluster.rank * a.slice, min(a.cols, (cluster.rank + 1) * a.slice),
             static_cast<int>(blockDim.x)},
        a(a),
        kept(kept) {}

  // The sum of the squares of the thread's columns, which it loads, or forms, and keeps.
  __device__ Sum sum_of_squares(int64_t row) const {
    Sum total;
    for (Index first = 0; first < chunks; first += tile) {
      XChunk x[kForwardVectors], input[kForwardVectors];
      each_chunk(first,
                 [&](int k, Index i) { x[k] = N::load(a, row, column(i), count(i), input[k]); });
      each_chunk(first,
                 [&](int k, Index i) { N::add(a, row, column(i), count(i), input[k], x[k]); });
      total = total + Sum(N::sum_of_squares(x));
      each_chunk(first, [&](int k, Index i) {
        if (kShared && i < chunks) put_chunk(kept, chunks, i, x[k]);
      });
    }
    return total;
  }

  // The tiles are gone through from the last to the first then: of a row that is read twice, what
  // was read last is the likeliest still to be in the cache.
  __device__ Index last_tile() const { return (chunks - 1) / tile * tile; }

  __device__ WChunk weight(Index i) const {
    return load_weight<typename N::W, N::kElems>(a.weight, column(i), count(i));
  }
  __device__ void load_weights(Index first, WChunk (&w)[kForwardVectors]) const {
    each_chunk(first, [&](int k, Index i) { w[k] = weight(i); });
  }

  // A chunk of x again. x_offset: where its row starts.
  __device__ void load_again(int64_t x_offset, Index i, XChunk& x) const {
    if constexpr (kShared) {
      get_chunk(kept, chunks, i, x);
    } else {
      x = load_chunk<typename N::X, N::kElems>(a.x, x_offset + column(i), count(i));
    }
  }

  // f(chunk, x, weight) for each of the thread's chunks in a tile.
  template <typename F>
  __device__ void each_chunk_again(int64_t x_offset, Index first, WChunk (&w)[kForwardVectors],
                                   const F& f) const {
    XChunk x[kForwardVectors];
    if (!kShared) each_chunk(first, [&](int k, Index i) { load_again(x_offset, i, x[k]); });
    each_chunk(first, [&](int k, Index i) {
      if (i >= chunks) return;
      if (kShared) load_again(x_offset, i, x[k]);
      f(i, x[k], w[k]);
    });
  }
};

}  // namespace rmsnorm::cuda

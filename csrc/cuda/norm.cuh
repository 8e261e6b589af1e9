// From x to its scale and its norm: what forward.cu and quant.cu share.
#pragma once
#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rmsnorm::cuda {

struct NormArgs : RowArgs {
  View y, input, residual;  // x = input + residual is formed first, if there is an input
  void* rstd;
  Mean mean;
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
  const float2 v = x * s.pre;
  if constexpr (kCast) {
    float2 n = v * s.hi;
    if constexpr (sizeof(X) == 4) {
      n = {__fmaf_rn(v.x, s.hi, v.x * s.lo), __fmaf_rn(v.y, s.hi, v.y * s.lo)};
    }
    return round_to<X>(n) * g;
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
    return tree_sum<kChunks * kElems / 2>([&](int i) {
      const float2 v = x[i / (kElems / 2)].get(i % (kElems / 2));
      if constexpr (sizeof(X) == 4) {
        return Sum::of_square(v.x) + Sum::of_square(v.y);
      } else {
        return __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x));
      }
    });
  }

  static __device__ WChunk load_weight(const NormArgs& a, int64_t col, int count) {
    return cuda::load_weight<W, kElems>(a.weight, col, count);
  }

  // x, or the residual and beside it the input, of the chunks that each(f) calls f(k, column,
  // count) for.
  template <typename Each, int kChunks>
  static __device__ void load(const NormArgs& a, int64_t row, const Each& each,
                              XChunk (&x)[kChunks], XChunk (&input)[kChunks]) {
    const View& from = kAdd ? a.residual : a.x;
    const int64_t offset = from.offset(row), input_offset = kAdd ? a.input.offset(row) : 0;
    each([&](int k, int64_t col, int count) {
      if constexpr (kAdd) input[k] = load_chunk<X, kElems>(a.input, input_offset + col, count);
      x[k] = load_chunk<X, kElems>(from, offset + col, count);
    });
  }

  // x as their sum; on its own, since a load does not go past a store.
  template <typename Each, int kChunks>
  static __device__ void add(const NormArgs& a, int64_t row, const Each& each,
                             const XChunk (&input)[kChunks], XChunk (&x)[kChunks]) {
    if constexpr (!kAdd) return;
    const int64_t offset = a.x.offset(row);
    each([&](int k, int64_t col, int count) {
      unrolled<kElems / 2>([&](int i) { x[k].set(i, input[k].get(i) + x[k].get(i)); });
      store_chunk<X>(a.x, offset + col, x[k], count);
    });
  }

  // Once x is summed up and before y, which may be x, is written.
  static __device__ Scale scale(const NormArgs& a, const Total<X>& sum, int64_t row,
                                const Cluster& cluster, int lane) {
    Scale s;
    if (!fast_scale(sum, a.mean, s)) {
      // For what its other lanes wrote. Longer rows have had a barrier.
      if (kAdd && a.lanes <= 32) __syncwarp(group_mask(a.lanes));
      s = rescued_scale(static_cast<const X*>(a.x.data) + a.x.offset(row), a.cols, a.eps, a.lanes);
      // Its warps read all of the row, which is the block's only one.
      if (a.lanes > 32) cluster.barrier();
    }
    if (a.rstd != nullptr && lane == 0 && cluster.rank == 0) {
      static_cast<float*>(a.rstd)[row] = s.hi * s.pre;
    }
    return s;
  }
};

// The head of a kernel of rows in registers. Short ones take few registers unasked.
#define SHORT_ROW_KERNEL(kernel, vectors, mixed)                                     \
  __global__ void __launch_bounds__(                                                 \
      (vectors) < kForwardVectors ? kTuned.forward_block_threads : kThreads<kernel>, \
      (vectors) < kForwardVectors ? 1 : blocks_of(kTuned.limits[kernel], mixed))

// The largest magnitude: as integers they are in the same order, and NaN is the largest of all. Its
// sum is that of both.
struct Largest {
  uint32_t bits = 0;

  __device__ void take(float v) { bits = max(bits, __float_as_uint(v) & 0x7fffffffu); }
};
__device__ inline Largest operator+(Largest a, Largest b) { return {max(a.bits, b.bits)}; }
__device__ inline Largest of_lane(Largest v, int distance) {
  return {__shfl_xor_sync(~0u, v.bits, distance)};
}

// The kernels of rows differ in their epilogue E: what is done with a row of the Norm E::N once its
// Scale s is known. E{args, row, s, largest}.store(column, count, x, w) does it for a chunk. With
// E::kFindsLargest, and args.per_token, E::largest_of(args, x, w, s) of all of them comes first.

// Rows held in registers, kVectors chunks per thread. A residual is as many bytes in flight again.
template <typename E, int kVectors>
__device__ void norm_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  constexpr int kRows = kForwardVectors / kVectors;
  const Cluster alone(1);
  RowGroup<kRows, kVectors, N::kElems> group{a.rows, static_cast<int>(a.cols), a.lanes, kRows == 1};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  typename N::WChunk w[kVectors];
  each_chunk([&](int k, int col, int count) { w[k] = N::load_weight(a, col, count); });

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename N::XChunk x[kRows][kVectors] = {}, input[kRows][kVectors] = {};
    Total<typename N::X> sum[kRows];
    const int live = group.live();
    group.each_row([&](int r, int64_t row) { N::load(a, row, each_chunk, x[r], input[r]); });
    group.each_row([&](int r, int64_t row) { N::add(a, row, each_chunk, input[r], x[r]); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= live) break;  // a short launch has few rows for a thread
      sum[r] = N::sum_of_squares(x[r]);
    }
    row_sum(sum, live, a.lanes, alone, turn);
    Scale s[kRows];
    Largest largest[kRows];
    if constexpr (E::kFindsLargest) {
      group.each_row([&](int r, int64_t row) {
        s[r] = N::scale(a, sum[r], row, alone, group.lane);
#pragma unroll
        for (int k = 0; k < kVectors && a.per_token; ++k) {
          largest[r] = largest[r] + E::largest_of(a, x[r][k], w[k], s[r]);
        }
      });
      if (a.per_token) row_sum(largest, live, a.lanes, alone, ++turn);
    }
    group.each_row([&](int r, int64_t row) {
      if constexpr (!E::kFindsLargest) s[r] = N::scale(a, sum[r], row, alone, group.lane);
      const E epilogue{a, row, s[r], largest[r]};
      each_chunk([&](int k, int col, int count) { epilogue.store(col, count, x[r][k], w[k]); });
    });
  }
}

// Longer rows, a tile of kForwardVectors chunks per thread at a time. With kShared they are held in
// shared memory, by several blocks if need be. Without, they may be of any length and are read
// twice.
template <typename E, bool kShared>
__device__ void norm_long_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  using Index = std::conditional_t<kShared, int, int64_t>;  // of a chunk
  using XChunk = typename N::XChunk;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.cluster);
  const int64_t begin = cluster.rank * a.slice;
  const Slice<Index, kForwardVectors, N::kElems> slice{begin, min(a.cols, begin + a.slice),
                                                       static_cast<int>(blockDim.x)};
  typename N::WChunk w[kForwardVectors];
  const auto load_weights = [&](Index first) {
    slice.each_chunk(first,
                     [&](int k, int64_t col, int count) { w[k] = N::load_weight(a, col, count); });
  };
  const auto load_again = [&](int64_t x_offset, Index i) {
    if constexpr (kShared) return get_chunk<XChunk>(kept, slice.chunks, i);
    return load_chunk<typename N::X, N::kElems>(a.x, x_offset + slice.column(i), slice.count(i));
  };

  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows;
       row += gridDim.x / cluster.size, ++turn) {
    Sum total;
    for (Index first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kForwardVectors], input[kForwardVectors];
      const auto each_chunk = [&](const auto& f) { slice.each_chunk(first, f); };
      N::load(a, row, each_chunk, x, input);
      N::add(a, row, each_chunk, input, x);
      total = total + Sum(N::sum_of_squares(x));
      slice.each_index(first, [&](int k, Index i) {
        if (kShared && i < slice.chunks) put_chunk(kept, slice.chunks, i, x[k]);
      });
    }
    Total<typename N::X> sum[] = {total};
    // The tiles are gone through from the last to the first then: of a row that is read twice, what
    // was read last is the likeliest still to be in the cache.
    Index first = (slice.chunks - 1) / slice.tile * slice.tile;
    load_weights(first);
    row_sum(sum, 1, slice.lanes, cluster, turn);
    const Scale s = N::scale(a, sum[0], row, cluster, slice.lane);
    const int64_t x_offset = kShared ? 0 : a.x.offset(row);
    Largest largest[1];
    if constexpr (E::kFindsLargest) {
      if (a.per_token) {
        slice.each_index([&](Index i) {
          XChunk x = load_again(x_offset, i);
          typename N::WChunk weight = N::load_weight(a, slice.column(i), slice.count(i));
          largest[0] = largest[0] + E::largest_of(a, x, weight, s);
        });
        row_sum(largest, 1, slice.lanes, cluster, ++turn);
      }
    }
    for (; first >= 0; first -= slice.tile) {
      const E epilogue{a, row, s, largest[0]};  // here, where it costs no register before
      XChunk x[kForwardVectors];
      slice.each_index(first, [&](int k, Index i) {
        if (!kShared) x[k] = load_again(x_offset, i);
      });
      slice.each_index(first, [&](int k, Index i) {
        if (i >= slice.chunks) return;
        if (kShared) x[k] = load_again(x_offset, i);
        epilogue.store(slice.column(i), slice.count(i), x[k], w[k]);
      });
      if (first > 0) load_weights(first - slice.tile);
    }
  }
}

}  // namespace rmsnorm::cuda

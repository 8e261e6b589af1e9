// From x to its scale and its norm: what forward.cu, quant.cu, rope_forward.cu and sandwich.cu
// share.
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
int launch_quant(const RmsNormForward& p, const NormArgs& args, bool plain, const Device& here,
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

// x * rstd * g; with kCast x * rstd is rounded before, to X or by round().
template <typename X, bool kCast, typename F>
__device__ float2 normalized(float2 x, float2 g, const Scale& s, const F& round) {
  const float2 v = x * s.pre;
  if constexpr (kCast) {
    float2 n = v * s.hi;
    if constexpr (sizeof(X) == 4) {
      n = {__fmaf_rn(v.x, s.hi, v.x * s.lo), __fmaf_rn(v.y, s.hi, v.y * s.lo)};
    }
    return round(n) * g;
  } else {
    return {scaled<X>(v.x, g.x, s), scaled<X>(v.y, g.y, s)};
  }
}
template <typename X, bool kCast>
__device__ float2 normalized(float2 x, float2 g, const Scale& s) {
  return normalized<X, kCast>(x, g, s, [](float2 n) { return round_to<X>(n); });
}

// The largest magnitude of elements of T, or NaN if one is. Its sum is that of both. As integers
// magnitudes are in the same order, with NaN above all.
template <typename T>
struct Largest {
#if __CUDA_ARCH__ >= 900
  static constexpr bool kPairs = sizeof(T) == 2;
#else
  static constexpr bool kPairs = false;
#endif
  uint32_t bits = 0;

  static __device__ uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (kPairs) asm("max.u16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return kPairs ? a : max(a, b);
  }
  template <int kElems>
  __device__ void take(const Chunk<T, kElems>& chunk) {
    if constexpr (kPairs) {
      unrolled<kElems / 2>([&](int i) { bits = larger(bits, chunk.word[i] & 0x7fff7fff); });
    } else {
      unrolled<kElems / 2>([&](int i) {
        const float2 v = chunk.get(i);
        bits = larger(bits, __float_as_uint(fabsf(v.x)));
        bits = larger(bits, __float_as_uint(fabsf(v.y)));
      });
    }
  }
  __device__ float value() const {
    if constexpr (!kPairs) return __uint_as_float(bits);
    const uint32_t largest = max(bits & 0xffff, bits >> 16);
    return unpack<T>(&largest).x;
  }
};
template <typename T>
__device__ Largest<T> operator+(Largest<T> a, Largest<T> b) {
  return {Largest<T>::larger(a.bits, b.bits)};
}
template <typename T>
__device__ Largest<T> of_lane(Largest<T> v, int distance) {
  return {__shfl_xor_sync(~0u, v.bits, distance)};
}

// y has the type of x or, where the kernel is not plain, any. kAdd: x is a sum, of a residual and
// an input of type X or, where the kernel is not plain and X is fp32, of any. There it may also be
// an unrounded sum, which a.x is not: each pass over a row forms it of its addends, and the last
// one stores it, rounded to the type of a.x, which may take the residual's place.
template <typename XType, Form kForm, bool kAdd>
struct Norm {
  using X = XType;
  static constexpr bool kPlain = kForm != Form::kAny;
  static constexpr int kElems = 16 / sizeof(X);
  using XChunk = Chunk<X, kElems>;
  using WChunk = Chunk<float, kElems>;
  using Y = std::conditional_t<kPlain, X, float>;  // in which y is held
  using YChunk = Chunk<Y, kElems>;
  using LargestY = Largest<Y>;
  static constexpr bool kMayBeUnrounded = kAdd && !kPlain && sizeof(X) == 4;

  static __device__ bool is_unrounded(const NormArgs& a) {
    return kMayBeUnrounded && a.x.dtype != DType::kFloat32;
  }
  // f(T()) with T the type of a.x, of an unrounded sum.
  template <typename F>
  static __device__ auto with_rounded_type(const NormArgs& a, const F& f) {
    return a.x.dtype == DType::kFloat16 ? f(__half()) : f(__nv_bfloat16());
  }

  // Squares of 16-bit numbers are exact in fp32 (or nearly), and 16-bit results forgive the rest
  // within a thread.
  template <int kChunks, int kCount>
  static __device__ Total<X> sum_of_squares(const Chunk<X, kCount> (&x)[kChunks]) {
    return tree_sum<kChunks * kCount / 2>([&](int i) {
      const float2 v = x[i / (kCount / 2)].get(i % (kCount / 2));
      if constexpr (sizeof(X) == 4) {
        return Sum::of_square(v.x) + Sum::of_square(v.y);
      } else {
        return __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x));
      }
    });
  }

  // x, or the residual and beside it the input, of the chunks that each(f) calls f(k, column,
  // count) for.
  template <typename Each, int kChunks>
  static __device__ void load(const NormArgs& a, int64_t row, int64_t begin, const Each& each,
                              XChunk (&x)[kChunks], XChunk (&input)[kChunks]) {
    const View& from = kAdd ? a.residual : a.x;
    const int64_t offset = begin + from.offset<kPlain>(row);
    const int64_t input_offset = begin + (kAdd ? a.input.offset<kPlain>(row) : 0);
    each([&](int k, auto col, int count) {
      if constexpr (kAdd) {
        input[k] = load_chunk<kPlain, X, kElems>(a.input, input_offset, col, count);
      }
      x[k] = load_chunk<kPlain, X, kElems>(from, offset, col, count);
    });
  }

  // x as their sum; on its own, since a load does not go past a store.
  template <typename Each, int kChunks>
  static __device__ void add(const NormArgs& a, int64_t row, int64_t begin, const Each& each,
                             const XChunk (&input)[kChunks], XChunk (&x)[kChunks]) {
    if constexpr (!kAdd) return;
    const int64_t offset = begin + a.x.offset<kPlain>(row);
    each([&](int k, auto col, int count) {
      unrolled<kElems / 2>([&](int i) { x[k].set(i, input[k].get(i) + x[k].get(i)); });
      if (!is_unrounded(a)) store_chunk<kPlain, X>(a.x, offset, col, x[k], count);
    });
  }

  // Of an unrounded sum, beside y; of any other it is there.
  template <typename Index>
  static __device__ void store_sum(const NormArgs& a, int64_t row, int64_t begin, Index col,
                                   int count, const XChunk& x) {
    if constexpr (kMayBeUnrounded) {
      if (!is_unrounded(a)) return;
      const int64_t offset = begin + a.x.offset<kPlain>(row);
      with_rounded_type(
          a, [&](auto type) { store_chunk<false, decltype(type)>(a.x, offset, col, x, count); });
    }
  }

  // x once more, when it is complete.
  template <typename Each, int kChunks>
  static __device__ void load_again(const NormArgs& a, int64_t row, int64_t begin, const Each& each,
                                    XChunk (&x)[kChunks]) {
    if constexpr (kMayBeUnrounded) {
      if (is_unrounded(a)) {
        XChunk input[kChunks];
        load(a, row, begin, each, x, input);
        return add(a, row, begin, each, input, x);
      }
    }
    const int64_t offset = begin + a.x.offset<kPlain>(row);
    each([&](int k, auto col, int count) {
      x[k] = load_chunk<kPlain, X, kElems>(a.x, offset, col, count);
    });
  }

  // Once x is summed up and before y, which may be x, is written. reload(): called for a row that
  // is rescued, to read again what is held of it, which would take registers meanwhile.
  template <typename F>
  static __device__ Scale scale(const NormArgs& a, const Total<X>& sum, int64_t row,
                                const Cluster& cluster, int lane, const F& reload) {
    Scale s;
    if (!fast_scale(sum, a.mean, s)) {
      // For what its other lanes wrote. Longer rows have had a barrier.
      if (kAdd && a.lanes <= 32) __syncwarp(group_mask(a.lanes));
      s = rescued(a, row);
      // Its warps read all of the row, which is the block's only one.
      if (a.lanes > 32) cluster.barrier();
      reload();
    }
    if (a.rstd != nullptr && lane == 0 && cluster.rank == 0) {
      static_cast<float*>(a.rstd)[row] = s.hi * s.pre;
    }
    return s;
  }

  static __device__ Scale rescued(const NormArgs& a, int64_t row) {
    if constexpr (kMayBeUnrounded) {
      if (is_unrounded(a)) {
        const int64_t input = a.input.offset<kPlain>(row),
                      residual = a.residual.offset<kPlain>(row);
        const auto element = [&](int64_t i) {
          return static_cast<float>(load_any(a.input.data, a.input.dtype, input + i)) +
                 static_cast<float>(load_any(a.residual.data, a.residual.dtype, residual + i));
        };
        return rescued_scale_of(element, a.cols, a.eps, a.lanes);
      }
    }
    const X* const x = static_cast<const X*>(a.x.data) + a.x.offset<kPlain>(row);
    return rescued_scale(x, a.cols, a.eps, a.lanes);
  }

  // y, rounded to its type.
  template <int kCount>
  static __device__ Chunk<Y, kCount> norm(const NormArgs& a, Chunk<X, kCount>& x,
                                          const Chunk<float, kCount>& w, const Scale& s) {
    const bool cast = kForm == Form::kPlainCast || (!kPlain && a.cast_before_weight);
    const auto round = [&](float2 n) {
      if (is_unrounded(a)) {
        return with_rounded_type(a, [&](auto type) { return round_to<decltype(type)>(n); });
      }
      return round_to<X>(n);
    };
    Chunk<Y, kCount> y;
    x.stay_packed();
    unrolled<kCount / 2>([&](int i) {
      float2 v = cast ? normalized<X, true>(x.get(i), w.get(i), s, round)
                      : normalized<X, false>(x.get(i), w.get(i), s);
      if (!kPlain && a.y.dtype == DType::kFloat16) v = round_to<__half>(v);
      if (!kPlain && a.y.dtype == DType::kBFloat16) v = round_to<__nv_bfloat16>(v);
      y.set(i, v);
    });
    return y;
  }

  template <typename Index, int kCount>
  static __device__ void store(const NormArgs& a, int64_t offset, Index col, int count,
                               const Chunk<Y, kCount>& y) {
    if constexpr (kPlain) {
      store_chunk<true, X>(a.y, offset, col, y, count);
    } else {
      with_type(a.y.dtype,
                [&](auto type) { store_chunk<false, decltype(type)>(a.y, offset, col, y, count); });
    }
  }
};

// The head of a kernel of rows in registers, with its launch bounds.
constexpr int threads_of(int vectors, KernelIndex kernel) {
  return vectors < kForwardVectors ? kTuned.forward_block_threads : kTuned.limits[kernel].threads;
}
#define SHORT_ROW_KERNEL(kernel, vectors, mixed) \
  __global__ void __launch_bounds__(             \
      threads_of(vectors, kernel),               \
      blocks_of(kTuned.limits[kernel], mixed, threads_of(vectors, kernel)))

// f(s), in a plain kernel with an s.pre of 1, which all rows but the rescued ones have, known to
// the compiler.
template <bool kPlain, typename S, typename F>
__device__ void with_scale(S s, const F& f) {
  if (kPlain && s.pre == 1.0f) {
    s.pre = 1.0f;
    f(s);
  } else {
    f(s);
  }
}

// The kernels of rows differ in their epilogue E: what is done with a row of the Norm E::N once its
// Scale s is known.
// - E::Place(args, row, begin) stores its chunks: place.store(column, count, y).
// - With E::kFindsLargest, Place is given the epilogue (after its prepare(args), once), the largest
//   of y in the row, if args.per_token, and whether it stores what a row has one
//   of.

// Rows held in registers, kVectors chunks per thread. A residual is as many bytes in flight again.
template <typename E, int kVectors>
__device__ void norm_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  using Index = std::conditional_t<N::kPlain, unsigned, int64_t>;  // of a row
  constexpr int kRows = kForwardVectors / kVectors, kThreads = kTuned.limits[kForwardRows].threads;
  const Cluster alone(1);
  RowGroup<Index, kRows, kVectors, N::kElems> group{a.rows, static_cast<int>(a.cols), kRows == 1};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  typename N::WChunk w[kVectors];
  E epilogue;

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename N::XChunk x[kRows][kVectors] = {}, input[kRows][kVectors] = {};
    Total<typename N::X> sum[kRows];
    group.each_row_or_none([&](int r, int64_t row, bool is_there) {
      const auto each = [&](const auto& f) { group.each_chunk(f, is_there); };
      N::load(a, row, 0, each, x[r], input[r]);
    });
    if (turn == 0) {  // after x, that a row waits for
      load_weights<N::kPlain>(a, 0, each_chunk, w);
      epilogue.prepare(a);
    }
    group.each_row([&](int r, int64_t row) { N::add(a, row, 0, each_chunk, input[r], x[r]); });
    unrolled<kRows>([&](int r) { sum[r] = N::sum_of_squares(x[r]); });
    row_sum<kThreads>(sum, turn);
    const auto scale_of = [&](int r, int64_t row) {
      return N::scale(a, sum[r], row, alone, group.lane,
                      [&] { N::load_again(a, row, 0, each_chunk, x[r]); });
    };
    if constexpr (E::kFindsLargest) {
      typename N::YChunk y[kRows][kVectors];
      typename N::LargestY largest[kRows];
      group.each_row([&](int r, int64_t row) {
        with_scale<N::kPlain>(scale_of(r, row), [&](const Scale& s) {
          unrolled<kVectors>([&](int k) {
            y[r][k] = N::norm(a, x[r][k], w[k], s);
            if (a.per_token) largest[r].take(y[r][k]);
          });
        });
        each_chunk(
            [&](int k, int col, int count) { N::store_sum(a, row, 0, col, count, x[r][k]); });
      });
      if (a.per_token) row_sum<kThreads>(largest, ++turn);
      group.each_row([&](int r, int64_t row) {
        typename E::Place place(epilogue, a, row, 0, largest[r], group.lane == 0);
        place.store(each_chunk, y[r]);
      });
    } else {
      group.each_row([&](int r, int64_t row) {
        const typename E::Place place(a, row, 0);
        with_scale<N::kPlain>(scale_of(r, row), [&](const Scale& s) {
          each_chunk([&](int k, int col, int count) {
            place.store(col, count, N::norm(a, x[r][k], w[k], s));
            N::store_sum(a, row, 0, col, count, x[r][k]);
          });
        });
      });
    }
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
  using YChunk = typename N::YChunk;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.cluster);
  const int64_t begin = cluster.rank * a.slice;
  const Slice<Index, kForwardVectors, N::kElems> slice{begin, min(a.cols, begin + a.slice)};
  E epilogue;
  epilogue.prepare(a);

  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows;
       row += gridDim.x / cluster.size, ++turn) {
    Sum total;
    for (Index first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kForwardVectors], input[kForwardVectors];
      const auto each_chunk = [&](const auto& f) { slice.each_chunk(first, f); };
      N::load(a, row, begin, each_chunk, x, input);
      N::add(a, row, begin, each_chunk, input, x);
      total = total + Sum(N::sum_of_squares(x));
      slice.each_index(first, [&](int k, Index i) {
        if (kShared && i < slice.chunks) put_chunk(kept, slice.chunks, i, x[k]);
      });
    }
    Total<typename N::X> sum = total;
    row_sum(sum, cluster, turn);
    // f(k, chunk, y) for all that a thread has. The tiles are gone through from the last to the
    // first: of a row that is read twice, what was read last is the likeliest still to be in the
    // cache. stores: an unrounded sum.
    const auto each_norm = [&](const Scale& s, bool stores, const auto& f) {
      for (Index first = (slice.chunks - 1) / slice.tile * slice.tile; first >= 0;
           first -= slice.tile) {
        const auto each_chunk = [&](const auto& f) { slice.each_chunk(first, f); };
        XChunk x[kForwardVectors];
        if (!kShared) N::load_again(a, row, begin, each_chunk, x);
        slice.each_index(first, [&](int k, Index i) {
          if (i >= slice.chunks) return;
          if (kShared) x[k] = get_chunk<XChunk>(kept, slice.chunks, i);
          typename N::WChunk w[1];
          load_weights<N::kPlain>(
              a, begin, [&](const auto& f) { f(0, slice.column(i), slice.count(i)); }, w);
          f(i, N::norm(a, x[k], w[0], s));
          if (stores) N::store_sum(a, row, begin, slice.column(i), slice.count(i), x[k]);
        });
      }
    };
    with_scale<N::kPlain>(N::scale(a, sum, row, cluster, slice.lane, [] {}), [&](const Scale& s) {
      if constexpr (E::kFindsLargest) {
        constexpr bool kKeeps = kShared && std::is_same_v<XChunk, YChunk>;
        typename N::LargestY largest;
        if (a.per_token) {
          each_norm(s, kKeeps, [&](Index i, const YChunk& y) {
            largest.take(y);
            if constexpr (kKeeps) put_chunk(kept, slice.chunks, i, y);
          });
          row_sum(largest, cluster, ++turn);
        }
        const typename E::Place place(epilogue, a, row, begin, largest,
                                      slice.lane == 0 && cluster.rank == 0);
        if constexpr (kKeeps) {
          if (a.per_token) {
            return slice.each_index([&](Index i) {
              place.store(slice.column(i), slice.count(i),
                          get_chunk<YChunk>(kept, slice.chunks, i));
            });
          }
        }
        each_norm(s, true, [&](Index i, const YChunk& y) {
          place.store(slice.column(i), slice.count(i), y);
        });
      } else {
        const typename E::Place place(a, row, begin);
        each_norm(s, true, [&](Index i, const YChunk& y) {
          place.store(slice.column(i), slice.count(i), y);
        });
      }
    });
  }
}

}  // namespace rmsnorm::cuda

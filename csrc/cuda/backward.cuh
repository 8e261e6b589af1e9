// The gradients of rows: what backward.cu and rope_backward.cu share.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rmsnorm::cuda {

// What the second pass over a long row needs of it. As Scale: x is multiplied by pre, then by rstd.
// mean is that of g * xhat.
struct RowStats {
  float rstd, pre, mean;
};

struct BackwardArgs : RowArgs {
  View dy, dx, dresidual;  // dx without data: not wanted, nor dresidual then
  const float* rstd;
  float* partial;  // sums for dweight, [blocks, cols]; or
  View dweight;    // itself, where there is one block; neither: not wanted
  RowStats* stats;
  float inv_cols;
  bool keeps_next;  // in shared memory: the next row
};

// DY is the type that dy is held in (held_dtype in plan.h).
template <typename X, typename DY, Form kForm>
struct Backward {
  static constexpr bool kPlain = kForm != Form::kAny;
  static constexpr int kElems = 16 / sizeof(X);
  static constexpr int kPairs = kElems / 2;
  using XChunk = Chunk<X, kElems>;
  using DYChunk = Chunk<DY, kElems>;
  using WChunk = Chunk<float, kElems>;
  using DWeightChunk = Chunk<float, kElems>;

  // rstd as it is, but for the rows that did not fit its range: those are looked at again, in
  // double. reload(): as in Norm::scale.
  template <typename F>
  static __device__ RowStats row_scale(const BackwardArgs& a, int64_t row, float rstd,
                                       const F& reload) {
    if (!(rstd < kMinFastRstd || rstd > kMaxFastRstd)) return {rstd, 1.0f, 0.0f};
    const X* const x = static_cast<const X*>(a.x.data) + a.x.offset<kPlain>(row);
    const Scale s = rescued_scale(x, a.cols, a.eps, a.lanes);
    reload();
    return {s.hi, s.pre, 0.0f};
  }

  // A row of x and dy, and where they start.
  struct Source {
    const BackwardArgs& a;
    const int64_t row, begin;
    const int64_t x_offset = begin + a.x.offset<kPlain>(row);
    const int64_t dy_offset = begin + a.dy.offset<kPlain>(row);

    // The chunks that each(f) calls f(k, column, count) for. With kFetch dresidual is fetched.
    template <bool kFetch, typename Each, int kChunks>
    __device__ void load(const Each& each, XChunk (&x)[kChunks], DYChunk (&dy)[kChunks]) const {
      each([&](int k, auto col, int count) {
        x[k] = load_chunk<kPlain, X, kElems>(a.x, x_offset, col, count);
        dy[k] = load_chunk<kPlain, DY, kElems>(a.dy, dy_offset, col, count);
      });
      if (kFetch) fetch_dresidual(each);
    }

    // The same chunks, of plain rows, to shared memory: x, then dy. They are there once the thread
    // has waited for them.
    template <typename Slice>
    __device__ void copy(const Slice& slice, uint4* to) const {
      const X* const x = static_cast<const X*>(a.x.data) + x_offset;
      const X* const dy = static_cast<const X*>(a.dy.data) + dy_offset;
      slice.each_index([&](int i) {
        __pipeline_memcpy_async(to + i, x + slice.column(i), 16);
        __pipeline_memcpy_async(to + slice.chunks + i, dy + slice.column(i), 16);
      });
    }

    // Brings dresidual into the L2 cache, for finish.
    template <typename Each>
    __device__ void fetch_dresidual(const Each& each) const {
      if (a.dresidual.data == nullptr) return;
      const int64_t offset = begin + a.dresidual.offset<kPlain>(row);
      const X* const dresidual = static_cast<const X*>(a.dresidual.data) + offset;
      each([&](int, auto col, int count) {
        if (count > 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(dresidual + col));
      });
    }
  };

  // x * rstd. s.pre is 1 but for rows that were rescued: a branch of their own spares the others
  // the product.
  static __device__ float2 normalized(float2 x, const RowStats& s) {
    return x * s.pre * float2{s.rstd, s.rstd};
  }
  template <typename F>
  static __device__ void with_stats(RowStats s, const F& f) {
    if (s.pre == 1.0f) {
      s.pre = 1.0f;
      f(s);
    } else {
      f(s);
    }
  }

  // The sum of g * xhat.
  template <int kChunks>
  static __device__ float dot(const XChunk (&x)[kChunks], const DYChunk (&dy)[kChunks],
                              const WChunk (&w)[kChunks], const RowStats& stats) {
    float result;
    with_stats(stats, [&](const RowStats& s) {
      result = tree_sum<kChunks * kPairs>([&](int i) {
        const int k = i / kPairs, j = i % kPairs;
        const float2 g = dy[k].get(j) * w[k].get(j), xhat = normalized(x[k].get(j), s);
        return __fmaf_rn(g.y, xhat.y, __fmul_rn(g.x, xhat.x));
      });
    });
    return result;
  }

  // Stores dx and adds to the sums for dweight, `count` of each from (row, begin + col) on.
  template <typename Index>
  static __device__ void finish(const BackwardArgs& a, int64_t row, int64_t begin, Index col,
                                int count, XChunk& x, DYChunk& dy, const WChunk& w,
                                const RowStats& s, DWeightChunk& dweight) {
    x.stay_packed();
    dy.stay_packed();
    Chunk<float, kElems> dx;
    unrolled<kPairs>([&](int i) {
      const float2 d = dy.get(i), g = d * w.get(i), sum = dweight.get(i);
      float2 xhat = normalized(x.get(i), s);
      const float2 rstd{s.rstd, s.rstd};
      dx.set(i, multiply_add(xhat, {-s.mean, -s.mean}, g) * rstd * s.pre);
      if (kForm == Form::kPlainCast || (!kPlain && a.cast_before_weight)) xhat = round_to<X>(xhat);
      dweight.set(i, multiply_add(d, xhat, sum));
    });
    if (a.dx.data == nullptr) return;
    if (a.dresidual.data != nullptr) {
      const int64_t offset = begin + a.dresidual.offset<kPlain>(row);
      const auto dresidual = load_chunk<kPlain, X, kElems>(a.dresidual, offset, col, count);
      unrolled<kPairs>([&](int i) { dx.set(i, dx.get(i) + dresidual.get(i)); });
    }
    store_chunk<kPlain, X>(a.dx, begin + row * a.cols, col, dx, count);
  }

  // The thread's part of the sum of g * xhat over a longer row. With kShared x and dy are kept
  // after it; those of plain rows have been there before.
  template <bool kShared, typename Index>
  static __device__ float dot_tiles(const BackwardArgs& a, int64_t row, const RowStats& stats,
                                    const Slice<Index, kBackwardVectors, kElems>& slice,
                                    uint4* kept) {
    constexpr bool kCopied = kShared && kPlain;
    const Source source{a, row, slice.begin};
    Sum total;
    for (Index first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kBackwardVectors] = {};
      DYChunk dy[kBackwardVectors] = {};
      WChunk w[kBackwardVectors];
      const auto each_chunk = [&](const auto& f) { slice.each_chunk(first, f); };
      const auto each_there = [&](const auto& f) {
        slice.each_index(first, [&](int k, Index i) {
          if (i < slice.chunks) f(k, i);
        });
      };
      uint4* const kept_dy = kept + slice.chunks;
      if constexpr (kCopied) {
        each_there([&](int k, Index i) {
          x[k] = get_chunk<XChunk>(kept, slice.chunks, i);
          dy[k] = get_chunk<DYChunk>(kept_dy, slice.chunks, i);
        });
      } else {
        source.template load<kShared>(each_chunk, x, dy);
      }
      load_weights<kPlain>(a, slice.begin, each_chunk, w);
      total = total + Sum(dot(x, dy, w, stats));
      if constexpr (kShared && !kCopied) {
        each_there([&](int k, Index i) {
          put_chunk(kept, slice.chunks, i, x[k]);
          put_chunk(kept_dy, slice.chunks, i, dy[k]);
        });
      }
    }
    return total;
  }

  // The sums for dweight of a block that has these columns.
  static __device__ void store_sums(const BackwardArgs& a, int64_t block, int64_t col, int count,
                                    const DWeightChunk& dweight) {
    if (a.partial != nullptr) {
      return store_chunk(a.partial + block * a.cols + col, dweight, count, a.cols % 4 == 0);
    }
    with_type(a.dweight.dtype, [&](auto type) {
      store_chunk<false, decltype(type)>(a.dweight, 0, col, dweight, count);
    });
  }

  static __device__ bool wants_sums(const BackwardArgs& a) {
    return a.partial != nullptr || a.dweight.data != nullptr;
  }
};

// The sums for dweight of a block, from those that its slots left in shared memory, row_elems
// apart.
__device__ inline void sum_slots(const BackwardArgs& a, int64_t block, const float* slot_sums,
                                 int row_elems, int slots) {
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < static_cast<int>(a.cols);
       col += blockDim.x * blockDim.y) {
    float total = 0;
    for (int i = 0; i < slots; ++i) total += slot_sums[i * row_elems + col];
    if (a.partial != nullptr) {
      a.partial[block * a.cols + col] = total;
    } else {
      store_any(const_cast<void*>(a.dweight.data), a.dweight.dtype, col, total);
    }
  }
}

// Rows of partial sums of a dweight.
struct PartialSums {
  const float* partial;  // [rows, cols]
  int64_t rows, cols;
  void* dweight;
  DType dtype;
};

// Each of at most kMostSides dweights as the sum of its partial sums, in one launch.
int sum_partials(const PartialSums* sums, int count, cudaStream_t stream);

}  // namespace rmsnorm::cuda

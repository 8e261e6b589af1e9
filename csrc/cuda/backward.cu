// dx and dweight of y = x * rstd * (weight + weight_offset): one reduction per row, and one over
// the rows.
#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rmsnorm::cuda {
namespace {

// What the second pass over a long row needs of it. As Scale: x is multiplied by pre, then by rstd.
// mean is that of g * xhat.
struct RowStats {
  float rstd, pre, mean;
};

struct BackwardArgs : RowArgs {
  View dy, dx, dresidual;  // dx without data: not wanted, nor dresidual then
  const float* rstd;
  float* partial;  // sums for dweight, [blocks, cols]; nullptr: not wanted
  RowStats* stats;
  float inv_cols;
  bool cast_before_weight;
};

// DY and W are the types that dy and the weight are held in (held_dtype in plan.h).
template <typename X, typename DY, typename W>
struct Backward {
  static constexpr int kElems = 16 / sizeof(X);
  static constexpr int kPairs = kElems / 2;
  using XChunk = Chunk<X, kElems>;
  using DYChunk = Chunk<DY, kElems>;
  using WChunk = Chunk<W, kElems>;
  using DWeightChunk = Chunk<float, kElems>;

  // rstd as it is, but for the rows that did not fit its range: those are looked at again, in
  // double.
  static __device__ RowStats row_scale(const BackwardArgs& a, int64_t row) {
    const float rstd = a.rstd[row];
    if (!(rstd < kMinFastRstd || rstd > kMaxFastRstd)) return {rstd, 1.0f, 0.0f};
    const Scale s =
        rescued_scale(static_cast<const X*>(a.x.data) + a.x.offset(row), a.cols, a.eps, a.lanes);
    return {s.hi, s.pre, 0.0f};
  }

  static __device__ WChunk load_weight(const BackwardArgs& a, int64_t col, int count) {
    return cuda::load_weight<W, kElems>(a.weight, col, count);
  }

  // A row of x and dy, and where they start.
  struct Source {
    const BackwardArgs& a;
    const int64_t row, x_offset = a.x.offset(row), dy_offset = a.dy.offset(row);

    // The chunks that each(f) calls f(k, column, count) for. With kFetch dresidual is brought into
    // the L2 cache, for finish.
    template <bool kFetch, typename Each, int kChunks>
    __device__ void load(const Each& each, XChunk (&x)[kChunks], DYChunk (&dy)[kChunks]) const {
      each([&](int k, int64_t col, int count) {
        x[k] = load_chunk<X, kElems>(a.x, x_offset + col, count);
        dy[k] = load_chunk<DY, kElems>(a.dy, dy_offset + col, count);
        if (!kFetch || count <= 0 || a.dresidual.data == nullptr) return;
        const X* const dresidual = static_cast<const X*>(a.dresidual.data);
        const int64_t index = a.dresidual.offset(row) + col;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(dresidual + index));
      });
    }
  };

  // The sum of g * xhat.
  template <int kChunks>
  static __device__ float dot(const BackwardArgs& a, const XChunk (&x)[kChunks],
                              const DYChunk (&dy)[kChunks], const WChunk (&w)[kChunks],
                              const RowStats& s) {
    return tree_sum<kChunks * kPairs>([&](int i) {
      const int k = i / kPairs, j = i % kPairs;
      const float2 g = dy[k].get(j) * (w[k].get(j) + a.weight_offset);
      const float2 xhat = x[k].get(j) * s.pre * s.rstd;
      return __fmaf_rn(g.y, xhat.y, __fmul_rn(g.x, xhat.x));
    });
  }

  // Stores dx and adds to the sums for dweight, `count` of each from (row, col) on.
  static __device__ void finish(const BackwardArgs& a, int64_t row, int64_t col, int count,
                                XChunk& x, DYChunk& dy, WChunk& w, const RowStats& s,
                                DWeightChunk& dweight) {
    x.stay_packed();
    dy.stay_packed();
    w.stay_packed();
    const bool has_dresidual = a.dresidual.data != nullptr;
    XChunk dx, dresidual;
    if (has_dresidual) {
      dresidual = load_chunk<X, kElems>(a.dresidual, a.dresidual.offset(row) + col, count);
    }
    unrolled<kPairs>([&](int i) {
      const float2 d = dy.get(i), g = d * (w.get(i) + a.weight_offset), sum = dweight.get(i);
      float2 xhat = x.get(i) * s.pre * s.rstd;
      float2 result = (g - xhat * s.mean) * s.rstd * s.pre;
      if (has_dresidual) result = result + dresidual.get(i);
      dx.set(i, result);
      if (a.cast_before_weight) xhat = round_to<X>(xhat);
      dweight.set(i, {__fmaf_rn(d.x, xhat.x, sum.x), __fmaf_rn(d.y, xhat.y, sum.y)});
    });
    if (a.dx.data != nullptr) store_chunk<X>(a.dx, row * a.cols + col, dx, count);
  }

  // The thread's part of the sum of g * xhat over a longer row. With kShared it keeps x and dy.
  template <bool kShared, typename Index>
  static __device__ float dot_tiles(const BackwardArgs& a, int64_t row, const RowStats& stats,
                                    const Slice<Index, kBackwardVectors, kElems>& slice,
                                    uint4* kept) {
    const Source source{a, row};
    Sum total;
    for (Index first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kBackwardVectors];
      DYChunk dy[kBackwardVectors];
      WChunk w[kBackwardVectors];
      const auto each_chunk = [&](const auto& f) {
        slice.each_chunk(first, [&](int k, int64_t col, int count) {
          f(k, col, count);
          w[k] = load_weight(a, col, count);
        });
      };
      source.template load<kShared>(each_chunk, x, dy);
      total = total + Sum(dot(a, x, dy, w, stats));
      slice.each_index(first, [&](int k, Index i) {
        if (!kShared || i >= slice.chunks) return;
        put_chunk(kept, slice.chunks, i, x[k]);
        put_chunk(kept + slice.chunks, slice.chunks, i, dy[k]);
      });
    }
    return total;
  }

  // The sums for dweight of a block that has these columns.
  static __device__ void store_partial(const BackwardArgs& a, int64_t block, int64_t col, int count,
                                       const DWeightChunk& dweight) {
    store_chunk(a.partial + block * a.cols + col, dweight, count, a.cols % 4 == 0);
  }
};

template <typename X, typename DY, typename W>
constexpr bool kMixed = sizeof(DY) > sizeof(X) || sizeof(W) > sizeof(X);

// Rows held in registers: x and dy are read once. Each thread keeps the sums for dweight of its
// columns over all rows that its block works on.
template <typename X, typename DY, typename W, int kVectors>
ROW_KERNEL(kBackwardRows, (kMixed<X, DY, W>))
backward_rows(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, W>;
  constexpr int kElems = B::kElems;
  constexpr int kRows = kBackwardVectors / kVectors;
  const Cluster alone(1);
  __shared__ alignas(8) float slot_sums[kTuned.backward_block_threads * kVectors * kElems];
  RowGroup<kRows, kVectors, kElems> group{a.rows, static_cast<int>(a.cols), a.lanes, false};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  typename B::WChunk w[kVectors];
  typename B::DWeightChunk dweight[kVectors] = {};
  each_chunk([&](int k, int col, int count) { w[k] = B::load_weight(a, col, count); });

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename B::XChunk x[kRows][kVectors] = {};
    typename B::DYChunk dy[kRows][kVectors] = {};
    RowStats stats[kRows] = {};
    float sum[kRows] = {};
    const int live = group.live();
    group.each_row([&](int r, int64_t row) {
      const typename B::Source source{a, row};
      source.template load<true>(each_chunk, x[r], dy[r]);
      stats[r] = B::row_scale(a, row);
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= live) break;
      sum[r] = B::dot(a, x[r], dy[r], w, stats[r]);
    }
    row_sum(sum, live, a.lanes, alone, turn);
    group.each_row([&](int r, int64_t row) {
      stats[r].mean = sum[r] * a.inv_cols;
      each_chunk([&](int k, int col, int count) {
        B::finish(a, row, col, count, x[r][k], dy[r][k], w[k], stats[r], dweight[k]);
      });
    });
  }
  if (a.partial == nullptr) return;
  const int row_elems = group.lanes * kVectors * kElems;
  each_chunk([&](int k, int col, int count) {
    if (group.slots == 1) return B::store_partial(a, blockIdx.x, col, count, dweight[k]);
    float2* const sums = reinterpret_cast<float2*>(slot_sums + group.slot * row_elems + col);
    unrolled<B::kPairs>([&](int i) { sums[i] = dweight[k].get(i); });
  });
  if (group.slots == 1) return;
  __syncthreads();
  for (int col = threadIdx.x; col < group.cols; col += blockDim.x) {
    float total = 0;
    for (int i = 0; i < group.slots; ++i) total += slot_sums[i * row_elems + col];
    a.partial[blockIdx.x * a.cols + col] = total;
  }
}

// Longer rows: x, dy and the sums for dweight are in shared memory, of several blocks if need be.
template <typename X, typename DY, typename W>
ROW_KERNEL(kBackwardSharedRows, false)
backward_shared_rows(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, W>;
  using DWeightChunk = typename B::DWeightChunk;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.cluster);
  const int64_t begin = cluster.rank * a.slice;
  const Slice<int, kBackwardVectors, B::kElems> slice{begin, min(a.cols, begin + a.slice),
                                                      static_cast<int>(blockDim.x)};
  const int chunks = slice.chunks;
  uint4* const kept_dy = kept + chunks;
  uint4* const kept_dweight = kept_dy + chunks * B::DYChunk::kVectors;

  slice.each_index([&](int i) { put_chunk(kept_dweight, chunks, i, DWeightChunk{}); });
  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows;
       row += gridDim.x / cluster.size, ++turn) {
    RowStats stats = B::row_scale(a, row);
    float sum[] = {B::template dot_tiles<true>(a, row, stats, slice, kept)};
    row_sum(sum, 1, slice.lanes, cluster, turn);
    stats.mean = sum[0] * a.inv_cols;
    slice.each_index([&](int i) {
      auto w = B::load_weight(a, slice.column(i), slice.count(i));
      auto x = get_chunk<typename B::XChunk>(kept, chunks, i);
      auto dy = get_chunk<typename B::DYChunk>(kept_dy, chunks, i);
      auto dweight = get_chunk<DWeightChunk>(kept_dweight, chunks, i);
      B::finish(a, row, slice.column(i), slice.count(i), x, dy, w, stats, dweight);
      put_chunk(kept_dweight, chunks, i, dweight);
    });
  }
  if (a.partial == nullptr) return;
  slice.each_index([&](int i) {
    B::store_partial(a, blockIdx.x / cluster.size, slice.column(i), slice.count(i),
                     get_chunk<DWeightChunk>(kept_dweight, chunks, i));
  });
}

// Rows of any length, in two passes that read x and dy each. The first finds the RowStats.
template <typename X, typename DY, typename W>
ROW_KERNEL(kBackwardLongStats, false)
backward_long_stats(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, W>;
  const Cluster alone(1);
  const Slice<int64_t, kBackwardVectors, B::kElems> slice{0, a.cols, kThreads<kBackwardLongStats>};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, ++turn) {
    RowStats stats = B::row_scale(a, row);
    float sum[] = {B::template dot_tiles<false>(a, row, stats, slice, nullptr)};
    row_sum(sum, 1, slice.lanes, alone, turn);
    stats.mean = sum[0] * a.inv_cols;
    if (slice.lane == 0) a.stats[row] = stats;
  }
}

// The second: a block owns a strip of columns and a range of rows, kStripRows at a time.
template <typename X, typename DY, typename W>
ROW_KERNEL(kBackwardLongStrips, false)
backward_long_strips(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, W>;
  constexpr int kElems = B::kElems;
  const int64_t col = (int64_t{blockIdx.x} * kThreads<kBackwardLongStrips> + threadIdx.x) * kElems;
  const int count = static_cast<int>(min(a.cols - col, int64_t{kElems}));
  if (count <= 0) return;
  const int64_t groups = (a.rows + kStripRows - 1) / kStripRows;
  const int64_t block_rows = (groups + gridDim.y - 1) / gridDim.y * kStripRows;
  const int64_t begin = blockIdx.y * block_rows, end = min(a.rows, begin + block_rows);

  typename B::WChunk w = B::load_weight(a, col, count);
  typename B::DWeightChunk dweight = {};
  for (int64_t first = begin; first < end; first += kStripRows) {
    typename B::XChunk x[kStripRows];
    typename B::DYChunk dy[kStripRows];
    const auto each_row = [&](const auto& f) {
      unrolled<kStripRows>([&](int r) {
        if (first + r < end) f(r, first + r);
      });
    };
    each_row([&](int r, int64_t row) {
      x[r] = load_chunk<X, kElems>(a.x, a.x.offset(row) + col, count);
      dy[r] = load_chunk<DY, kElems>(a.dy, a.dy.offset(row) + col, count);
    });
    each_row([&](int r, int64_t row) {
      B::finish(a, row, col, count, x[r], dy[r], w, a.stats[row], dweight);
    });
  }
  if (a.partial != nullptr) B::store_partial(a, blockIdx.y, col, count, dweight);
}

struct DWeightArgs {
  const float* partial;
  void* dweight;
  DType dtype;
  int64_t blocks, cols;
};

// The sum of the partial sums, each column's in one fixed order, in double.
__global__ __launch_bounds__(1024) void dweight_sum(const __grid_constant__ DWeightArgs a) {
  sync_dependent_launch();
  __shared__ double sums[32][33];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * 32;
  double sum = 0;
  if (first + lane < a.cols) {
#pragma unroll 8
    for (int64_t i = group; i < a.blocks; i += 32) sum += a.partial[i * a.cols + first + lane];
  }
  sums[group][lane] = sum;
  __syncthreads();
  sum = sums[lane][group];  // now a warp has a column
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0 && first + group < a.cols) store_any(a.dweight, a.dtype, first + group, sum);
}

// How a call is laid out, in the workspace too: the statistics of long rows, then the partial sums.
struct Layout {
  Plan plan;
  StripPlan strips;
  int64_t partial_rows, stats_bytes;

  Layout(const RmsNormBackward& p, const Device& here)
      : plan(plan_backward(p.rows, p.cols, p.dy_dtype, p.x_dtype, weight_dtype(p), here)),
        strips(plan_strips(p.rows, p.cols, p.x_dtype, here)) {
    const bool once = plan.keep != Keep::kNowhere;
    partial_rows = once ? plan.blocks / plan.cluster : strips.blocks;
    stats_bytes = once ? 0 : ceil_div(p.rows * sizeof(RowStats), 64) * 64;
  }
};

template <typename X, typename DY, typename W>
int launch_rows(const BackwardArgs& a, const Layout& layout, cudaStream_t stream) {
  const Plan& plan = layout.plan;
  if (plan.keep != Keep::kNowhere) {
    void (*kernel)(BackwardArgs) = plan.keep == Keep::kShared ? backward_shared_rows<X, DY, W>
                                   : plan.vectors == 1        ? backward_rows<X, DY, W, 1>
                                                              : backward_rows<X, DY, W, 2>;
    return launch(kernel, plan, a, stream);
  }
  const int error = launch(backward_long_stats<X, DY, W>, plan, a, stream);
  if (error != 0) return error;
  const dim3 grid(static_cast<unsigned>(layout.strips.strips),
                  static_cast<unsigned>(layout.strips.blocks));
  return launch(backward_long_strips<X, DY, W>, grid, kThreads<kBackwardLongStrips>, a, stream);
}

bool in_double(const RmsNormBackward& p) {
  return is_double(p.dy_dtype) || is_double(p.x_dtype) || is_double(weight_dtype(p));
}

}  // namespace

int64_t rms_norm_backward_workspace(const RmsNormBackward& p) {
  if (in_double(p)) return backward_in_double_workspace(p);
  const Layout layout(p, device());
  return layout.stats_bytes +
         (p.dweight != nullptr ? layout.partial_rows * p.cols * int64_t{sizeof(float)} : 0);
}

int rms_norm_backward(const RmsNormBackward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  if (in_double(p)) return backward_in_double(p, s);

  const Layout layout(p, here);
  BackwardArgs a{row_args(p, layout.plan)};
  a.dy = view_of(p, p.dy, p.dy_dtype, p.dy_rows);
  a.dx = view_of(p, p.dx, p.x_dtype, Rows{1, {}, {p.cols}});
  if (p.dx != nullptr) a.dresidual = view_of(p, p.dresidual, p.x_dtype, p.dresidual_rows);
  a.rstd = static_cast<const float*>(p.rstd);
  a.stats = static_cast<RowStats*>(p.workspace);
  if (p.dweight != nullptr) {
    a.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + layout.stats_bytes);
  }
  a.inv_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
  a.cast_before_weight = p.cast_before_weight;
  const int error = with_type(p.x_dtype, [&](auto x) {
    return with_held_type(x, p.x_dtype, p.dy_dtype, [&](auto dy) {
      return with_held_type(x, p.x_dtype, a.weight.dtype, [&](auto w) {
        return launch_rows<decltype(x), decltype(dy), decltype(w)>(a, layout, s);
      });
    });
  });
  if (error != 0 || p.dweight == nullptr) return error;
  const DWeightArgs d{a.partial, p.dweight, p.w_dtype, layout.partial_rows, p.cols};
  return launch(dweight_sum, static_cast<unsigned>(ceil_div(p.cols, 32)), 1024, d, s);
}

}  // namespace rmsnorm::cuda

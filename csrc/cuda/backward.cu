// dx and dweight of y = x * rstd * (weight + weight_offset): one reduction per row, and one over
// the rows.
#include <cuda_pipeline_primitives.h>

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

// Rows held in registers: x and dy are read once. Each thread keeps the sums for dweight of its
// columns over all rows that its block works on.
template <typename X, typename DY, Form kForm, int kVectors>
ROW_KERNEL(kBackwardRows, (sizeof(DY) > sizeof(X)))
backward_rows(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, kForm>;
  using Index = std::conditional_t<B::kPlain, unsigned, int64_t>;  // of a row
  constexpr int kElems = B::kElems, kMaxThreads = kThreads<kBackwardRows>;
  constexpr int kRows = kBackwardVectors / kVectors;
  __shared__ alignas(8) float slot_sums[kTuned.backward_block_threads * kVectors * kElems];
  RowGroup<Index, kRows, kVectors, kElems> group{a.rows, static_cast<int>(a.cols), false};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  typename B::WChunk w[kVectors];
  typename B::DWeightChunk dweight[kVectors] = {};

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename B::XChunk x[kRows][kVectors] = {};
    typename B::DYChunk dy[kRows][kVectors] = {};
    RowStats stats[kRows] = {};
    float rstd[kRows] = {}, sum[kRows] = {};
    const auto load = [&](int r, int64_t row, bool is_there) {
      const typename B::Source source{a, row, 0};
      source.template load<true>([&](const auto& f) { group.each_chunk(f, is_there); }, x[r],
                                 dy[r]);
    };
    group.each_row_or_none([&](int r, int64_t row, bool is_there) {
      load(r, row, is_there);
      rstd[r] = is_there ? a.rstd[row] : 1.0f;
    });
    if (turn == 0) load_weights<B::kPlain>(a, 0, each_chunk, w);  // after x, that a row waits for
    group.each_row_or_none([&](int r, int64_t row, bool is_there) {
      stats[r] = B::row_scale(a, row, rstd[r], [&] { load(r, row, is_there); });
      sum[r] = B::dot(x[r], dy[r], w, stats[r]);
    });
    row_sum<kMaxThreads>(sum, turn);
    group.each_row([&](int r, int64_t row) {
      stats[r].mean = sum[r] * a.inv_cols;
      B::with_stats(stats[r], [&](const RowStats& s) {
        each_chunk([&](int k, int col, int count) {
          B::finish(a, row, 0, col, count, x[r][k], dy[r][k], w[k], s, dweight[k]);
        });
      });
    });
  }
  if (!B::wants_sums(a)) return;
  const int row_elems = group.lanes * kVectors * kElems, slots = blockDim.y;
  each_chunk([&](int k, int col, int count) {
    if (slots == 1) return B::store_sums(a, blockIdx.x, col, count, dweight[k]);
    float2* const sums = reinterpret_cast<float2*>(slot_sums + group.slot * row_elems + col);
    unrolled<B::kPairs>([&](int i) { sums[i] = dweight[k].get(i); });
  });
  if (slots == 1) return;
  __syncthreads();
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < group.cols;
       col += blockDim.x * blockDim.y) {
    float total = 0;
    for (int i = 0; i < slots; ++i) total += slot_sums[i * row_elems + col];
    if (a.partial != nullptr) {
      a.partial[blockIdx.x * a.cols + col] = total;
    } else {
      store_any(const_cast<void*>(a.dweight.data), a.dweight.dtype, col, total);
    }
  }
}

// Longer rows: x, dy and the sums for dweight are in shared memory, of several blocks if need be.
// Plain rows are copied there past the registers; where there is room, the next one while one is
// worked on. A thread reads what it copied itself, so no other waits for it.
template <typename X, typename DY, Form kForm>
ROW_KERNEL(kBackwardSharedRows, false)
backward_shared_rows(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, kForm>;
  using DWeightChunk = typename B::DWeightChunk;
  extern __shared__ uint4 kept_dweight[];
  const Cluster cluster(a.cluster);
  const int64_t begin = cluster.rank * a.slice, stride = gridDim.x / cluster.size;
  const Slice<int, kBackwardVectors, B::kElems> slice{begin, min(a.cols, begin + a.slice)};
  const int chunks = slice.chunks;
  const auto kept_row = [&](int turn) {
    uint4* const rows = kept_dweight + chunks * DWeightChunk::kVectors;
    return rows + (a.keeps_next && turn % 2 ? chunks * (1 + B::DYChunk::kVectors) : 0);
  };
  const auto copy = [&](int64_t row, int turn) {
    if constexpr (B::kPlain) {
      if (row < a.rows) typename B::Source{a, row, begin}.copy(slice, kept_row(turn));
      __pipeline_commit();
    }
  };

  slice.each_index([&](int i) { put_chunk(kept_dweight, chunks, i, DWeightChunk{}); });
  int64_t row = blockIdx.x / cluster.size;
  float next_rstd = row < a.rows ? a.rstd[row] : 1.0f;
  if (a.keeps_next) copy(row, 0);
  for (int turn = 0; row < a.rows; row += stride, ++turn) {
    const float rstd = next_rstd;
    if (row + stride < a.rows) next_rstd = a.rstd[row + stride];
    a.keeps_next ? copy(row + stride, turn + 1) : copy(row, turn);
    if constexpr (B::kPlain) {
      typename B::Source{a, row, begin}.fetch_dresidual([&](const auto& f) {
        slice.each_index([&](int i) { f(0, slice.column(i), slice.count(i)); });
      });
    }
    RowStats stats = B::row_scale(a, row, rstd, [] {});
    a.keeps_next ? __pipeline_wait_prior(1) : __pipeline_wait_prior(0);
    uint4* const kept_x = kept_row(turn);
    float sum = B::template dot_tiles<true>(a, row, stats, slice, kept_x);
    row_sum(sum, cluster, turn);
    stats.mean = sum * a.inv_cols;
    B::with_stats(stats, [&](const RowStats& s) {
      slice.each_index([&](int i) {
        typename B::WChunk w[1];
        const int col = slice.column(i), count = slice.count(i);
        load_weights<B::kPlain>(a, begin, [&](const auto& f) { f(0, col, count); }, w);
        auto x = get_chunk<typename B::XChunk>(kept_x, chunks, i);
        auto dy = get_chunk<typename B::DYChunk>(kept_x + chunks, chunks, i);
        auto dweight = get_chunk<DWeightChunk>(kept_dweight, chunks, i);
        B::finish(a, row, begin, col, count, x, dy, w[0], s, dweight);
        put_chunk(kept_dweight, chunks, i, dweight);
      });
    });
  }
  if (!B::wants_sums(a)) return;
  slice.each_index([&](int i) {
    B::store_sums(a, blockIdx.x / cluster.size, begin + slice.column(i), slice.count(i),
                  get_chunk<DWeightChunk>(kept_dweight, chunks, i));
  });
}

// Rows of any length, in two passes that read x and dy each. The first finds the RowStats.
template <typename X, typename DY>
ROW_KERNEL(kBackwardLongStats, false)
backward_long_stats(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, Form::kAny>;
  const Cluster alone(1);
  const Slice<int64_t, kBackwardVectors, B::kElems> slice{0, a.cols};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, ++turn) {
    RowStats stats = B::row_scale(a, row, a.rstd[row], [] {});
    float sum = B::template dot_tiles<false>(a, row, stats, slice, nullptr);
    row_sum(sum, alone, turn);
    stats.mean = sum * a.inv_cols;
    if (slice.lane == 0) a.stats[row] = stats;
  }
}

// The second: a block owns a strip of columns and a range of rows, kStripRows at a time.
template <typename X, typename DY>
ROW_KERNEL(kBackwardLongStrips, false)
backward_long_strips(const __grid_constant__ BackwardArgs a) {
  sync_dependent_launch();
  using B = Backward<X, DY, Form::kAny>;
  constexpr int kElems = B::kElems;
  const int64_t col = (int64_t{blockIdx.x} * kThreads<kBackwardLongStrips> + threadIdx.x) * kElems;
  const int count = static_cast<int>(min(a.cols - col, int64_t{kElems}));
  if (count <= 0) return;
  const int64_t groups = (a.rows + kStripRows - 1) / kStripRows;
  const int64_t block_rows = (groups + gridDim.y - 1) / gridDim.y * kStripRows;
  const int64_t begin = blockIdx.y * block_rows, end = min(a.rows, begin + block_rows);

  typename B::WChunk w[1];
  load_weights<false>(a, 0, [&](const auto& f) { f(0, col, count); }, w);
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
      const typename B::Source source{a, row, 0};
      x[r] = load_chunk<false, X, kElems>(a.x, source.x_offset, col, count);
      dy[r] = load_chunk<false, DY, kElems>(a.dy, source.dy_offset, col, count);
    });
    each_row([&](int r, int64_t row) {
      B::finish(a, row, 0, col, count, x[r], dy[r], w[0], a.stats[row], dweight);
    });
  }
  if (B::wants_sums(a)) B::store_sums(a, blockIdx.y, col, count, dweight);
}

struct DWeightArgs {
  const float* partial;
  void* dweight;
  DType dtype;
  int blocks, group_bits;
  int64_t cols;
};

// The sum of the partial sums, each column's in one fixed order, in double. A warp has 32 columns
// of each 2^group_bits-th of them; then a column is that of so many lanes.
__global__ __launch_bounds__(1024) void dweight_sum(const __grid_constant__ DWeightArgs a) {
  sync_dependent_launch();
  __shared__ double sums[kWarp][kWarp + 1];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp, groups = 1 << a.group_bits;
  const int64_t first = int64_t{blockIdx.x} * kWarp, stride = a.cols << a.group_bits;
  double sum = 0;
  if (first + lane < a.cols) {
    const float* partial = a.partial + group * a.cols + first + lane;
#pragma unroll 8
    for (int i = group; i < a.blocks; i += groups, partial += stride) sum += *partial;
  }
  sums[group][lane] = sum;
  __syncthreads();
  const int col = threadIdx.x >> a.group_bits;
  sum = sums[threadIdx.x & (groups - 1)][col];
  for (int o = groups / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if ((threadIdx.x & (groups - 1)) == 0 && first + col < a.cols) {
    store_any(a.dweight, a.dtype, first + col, sum);
  }
}

int sum_partials(const BackwardArgs& a, int64_t blocks, void* dweight, DType dtype,
                 cudaStream_t stream) {
  DWeightArgs d{a.partial, dweight, dtype, static_cast<int>(blocks), 0, a.cols};
  // A thread's few reads are under way at a time.
  constexpr int kReads = 8;
  while (1 << d.group_bits < kWarp && blocks > int64_t{kReads} << d.group_bits) ++d.group_bits;
  return launch(dweight_sum, static_cast<unsigned>(ceil_div(a.cols, kWarp)), kWarp << d.group_bits,
                d, stream);
}

// How a call is laid out, in the workspace too: the statistics of long rows, then the partial sums.
struct Layout {
  Plan plan;
  StripPlan strips;
  int64_t partial_rows, stats_bytes;
  bool keeps_next;

  Layout(const RmsNormBackward& p, const Device& here)
      : plan(plan_backward(p.rows, p.cols, p.dy_dtype, p.x_dtype, here)),
        strips(plan_strips(p.rows, p.cols, p.x_dtype, here)) {
    const bool once = plan.keep != Keep::kNowhere;
    partial_rows = once ? plan.blocks / plan.cluster : strips.blocks;
    stats_bytes = once ? 0 : ceil_div(p.rows * sizeof(RowStats), 64) * 64;
    const int64_t chunks = plan.slice / vector_elems(p.x_dtype);
    keeps_next = plan.shared_bytes > chunks * backward_kept_bytes(p.dy_dtype, p.x_dtype);
  }
};

template <typename X, typename DY, Form kForm>
int launch_rows(const BackwardArgs& a, const Layout& layout, cudaStream_t stream) {
  const Plan& plan = layout.plan;
  if (plan.keep != Keep::kNowhere) {
    void (*kernel)(BackwardArgs) = plan.keep == Keep::kShared ? backward_shared_rows<X, DY, kForm>
                                   : plan.vectors == 1        ? backward_rows<X, DY, kForm, 1>
                                                              : backward_rows<X, DY, kForm, 2>;
    return launch(kernel, plan, a, stream);
  }
  const int error = launch(backward_long_stats<X, DY>, plan, a, stream);
  if (error != 0) return error;
  const dim3 grid(static_cast<unsigned>(layout.strips.strips),
                  static_cast<unsigned>(layout.strips.blocks));
  return launch(backward_long_strips<X, DY>, grid, kThreads<kBackwardLongStrips>, a, stream);
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
  BackwardArgs a{row_args(p)};
  lay_out(a, layout.plan);
  a.dy = view_of(p, p.dy, p.dy_dtype, p.dy_rows);
  a.dx = view_of(p, p.dx, p.x_dtype, Rows{1, {}, {p.cols}});
  if (p.dx != nullptr) a.dresidual = view_of(p, p.dresidual, p.x_dtype, p.dresidual_rows);
  a.rstd = static_cast<const float*>(p.rstd);
  a.stats = static_cast<RowStats*>(p.workspace);
  const bool one_block = layout.partial_rows == 1;
  if (p.dweight != nullptr && one_block) {
    a.dweight = view_of(p, p.dweight, p.w_dtype, Rows{1, {}, {0}});
  } else if (p.dweight != nullptr) {
    a.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + layout.stats_bytes);
  }
  a.inv_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
  a.keeps_next = layout.keeps_next;
  const bool plain = is_plain(a, a.dy, a.dx, a.dresidual);
  const int error = with_type(p.x_dtype, [&](auto x) {
    using X = decltype(x);
    return with_form(plain, a.cast_before_weight, [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      if (kForm != Form::kAny || p.dy_dtype == p.x_dtype) {
        return launch_rows<X, X, kForm>(a, layout, s);
      }
      return launch_rows<X, float, Form::kAny>(a, layout, s);
    });
  });
  if (error != 0 || a.partial == nullptr) return error;
  return sum_partials(a, layout.partial_rows, p.dweight, p.w_dtype, s);
}

}  // namespace rmsnorm::cuda

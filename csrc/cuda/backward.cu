// dx and dweight of y = x * rstd * (weight + weight_offset): one reduction per row, and one over
// the rows.
#include "backward.cuh"

namespace rmsnorm::cuda {
namespace {

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
  sum_slots(a, blockIdx.x, slot_sums, row_elems, slots);
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
  PartialSums sums[kMostSides];
  int group_bits;
};

// The sum of the partial sums, each column's in one fixed order, in double. A warp has 32 columns
// of each 2^group_bits-th of them; then a column is that of so many lanes.
__global__ __launch_bounds__(1024) void dweight_sum(const __grid_constant__ DWeightArgs args) {
  sync_dependent_launch();
  __shared__ double sums[kWarp][kWarp + 1];
  const PartialSums& a = args.sums[blockIdx.y];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp, groups = 1 << args.group_bits;
  const int64_t first = int64_t{blockIdx.x} * kWarp, stride = a.cols << args.group_bits;
  double sum = 0;
  if (first + lane < a.cols) {
    const float* partial = a.partial + group * a.cols + first + lane;
    const int rows = static_cast<int>(a.rows);
#pragma unroll 8
    for (int i = group; i < rows; i += groups, partial += stride) sum += *partial;
  }
  sums[group][lane] = sum;
  __syncthreads();
  const int col = threadIdx.x >> args.group_bits;
  sum = sums[threadIdx.x & (groups - 1)][col];
  for (int o = groups / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if ((threadIdx.x & (groups - 1)) == 0 && first + col < a.cols) {
    store_any(a.dweight, a.dtype, first + col, sum);
  }
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

int sum_partials(const PartialSums* sums, int count, cudaStream_t stream) {
  DWeightArgs d{};
  int64_t rows = 0, cols = 0;
  for (int i = 0; i < count; ++i) {
    d.sums[i] = sums[i];
    rows = std::max(rows, sums[i].rows);
    cols = std::max(cols, sums[i].cols);
  }
  // A thread's few reads are under way at a time.
  constexpr int kReads = 8;
  while (1 << d.group_bits < kWarp && rows > int64_t{kReads} << d.group_bits) ++d.group_bits;
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kWarp)), count);
  return launch(dweight_sum, grid, kWarp << d.group_bits, d, stream);
}

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
  const PartialSums sums{a.partial, layout.partial_rows, p.cols, p.dweight, p.w_dtype};
  return sum_partials(&sums, 1, s);
}

}  // namespace rmsnorm::cuda

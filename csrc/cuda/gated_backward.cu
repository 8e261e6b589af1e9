// dx, dgate and dweight of a norm with a gate, of groups of columns: see gated.cuh.
#include "backward.cuh"
#include "gated.cuh"

namespace rmsnorm::cuda {
namespace {

struct GatedBackwardArgs : RowArgs, GateArgs {
  View dy, dx, dgate;  // without data: not wanted
  const float* rstd;   // [groups, rows]
  float* partial;      // sums for dweight, [group_blocks, all_cols]; or
  View dweight;        // itself, where a group has one block; neither: not wanted
  float inv_cols;
  bool keeps_next;   // gated_backward_shared_rows: the next row
  bool shares_sums;  // gated_backward_any_rows: they are in shared memory until the end

  __device__ bool wants_sums() const { return partial != nullptr || dweight.data != nullptr; }
};

template <typename X, Order kOrder>
struct GatedGradient : Gated<X, kOrder> {
  using G = Gated<X, kOrder>;
  using typename G::Floats;
  using typename G::OtherChunk;
  using typename G::XChunk;
  static constexpr int kElems = G::kElems, kPairs = G::kPairs;

  // What is read of a row.
  struct Chunks {
    XChunk x;
    OtherChunk dy, gate;
  };
  struct Source {
    const GatedBackwardArgs& a;
    const typename G::Place place;
    const int64_t dy;
    __device__ Source(const GatedBackwardArgs& a, int64_t row, int64_t begin)
        : a(a), place(a, a, row, begin), dy(begin + a.dy.offset<G::kPlain>(row)) {}

    template <typename Index>
    __device__ void load(Index col, int count, Chunks& c) const {
      using Other = typename G::Other;
      c.x = load_chunk<G::kPlain, X, kElems>(a.x, place.x, col, count);
      c.dy = load_chunk<G::kPlain, Other, kElems>(a.dy, dy, col, count);
      if (a.gate.data != nullptr) {
        c.gate = load_chunk<G::kPlain, Other, kElems>(a.gate, place.gate, col, count);
      }
    }

    // The chunks of a plain row to shared memory: x, dy, then the gate. They are there once the
    // thread has waited for them.
    template <typename Slice>
    __device__ void copy(const Slice& slice, uint4* to) const {
      const auto copy_from = [&](const View& from, int64_t offset, uint4* to) {
        const X* const row = static_cast<const X*>(from.data) + offset;
        slice.each_index(
            [&](int i) { __pipeline_memcpy_async(to + i, row + slice.column(i), 16); });
      };
      copy_from(a.x, place.x, to);
      copy_from(a.dy, dy, to + slice.chunks);
      if (a.gate.data != nullptr) copy_from(a.gate, place.gate, to + 2 * slice.chunks);
    }
  };

  static __device__ Chunks nothing(const GatedBackwardArgs& a) { return {{}, {}, G::no_gate(a)}; }

  // 1 / RMS = rstd * pre, and the mean of g * xhat.
  struct Stats {
    float rstd, pre, mean;
  };
  // rstd as it is, but for rows that did not fit its range: those are looked at again, in double.
  // reload(): as in Norm::scale.
  template <typename F>
  static __device__ Stats stats_of(const GatedBackwardArgs& a, int64_t row, int64_t begin,
                                   float rstd, const F& reload) {
    if (!(rstd < kMinFastRstd || rstd > kMaxFastRstd)) return {rstd, 1.0f, 0.0f};
    const Scale s = G::rescued(a, a, typename G::Place(a, a, row, begin));
    reload();
    return {s.hi, s.pre, 0.0f};
  }

  static __device__ float2 xhat_of(float2 v, const Stats& s) {
    return v * s.pre * float2{s.rstd, s.rstd};
  }

  // g * xhat of a pair, summed up.
  static __device__ float product(const GatedBackwardArgs& a, const Chunks& c, const Floats& w,
                                  const Stats& s, int i) {
    const float2 activated = G::activated(a, c.gate.get(i));
    const float2 g = G::times_behind(a, c.dy.get(i), activated) * w.get(i);
    const float2 xhat = xhat_of(G::times_before(a, c.x.get(i), activated), s);
    return __fmaf_rn(g.y, xhat.y, __fmul_rn(g.x, xhat.x));
  }
  template <int kChunks>
  static __device__ float dot(const GatedBackwardArgs& a, const Chunks (&c)[kChunks],
                              const Floats (&w)[kChunks], const Stats& s) {
    return tree_sum<kChunks * kPairs>(
        [&](int i) { return product(a, c[i / kPairs], w[i / kPairs], s, i % kPairs); });
  }

  // dx and dgate; adds to the sums for dweight.
  static __device__ void finish(const GatedBackwardArgs& a, Chunks& c, const Floats& w,
                                const Stats& s, XChunk& dx, OtherChunk& dgate, Floats& dweight) {
    c.x.stay_packed();
    c.dy.stay_packed();
    c.gate.stay_packed();
    const bool cast = kOrder == Order::kBehindCast || (!G::kPlain && a.cast_before_weight);
    unrolled<kPairs>([&](int i) {
      const float2 gate = c.gate.get(i), x = c.x.get(i), dy = c.dy.get(i), weight = w.get(i);
      const Sigmoid left = G::sigmoid(a, gate.x), right = G::sigmoid(a, gate.y);
      const bool is_sigmoid = a.is_sigmoid;
      const float2 activated{left.activated(gate.x, is_sigmoid),
                             right.activated(gate.y, is_sigmoid)};
      const float2 slope{left.slope(gate.x, is_sigmoid), right.slope(gate.y, is_sigmoid)};
      const float2 xhat = xhat_of(G::times_before(a, x, activated), s), rstd{s.rstd, s.rstd};
      const float2 d = G::times_behind(a, dy, activated);
      const float2 dv = multiply_add(xhat, {-s.mean, -s.mean}, d * weight) * rstd * s.pre;
      dx.set(i, G::times_before(a, dv, activated));
      // The norm as the forward multiplied by it.
      const float2 seen = cast ? round_to<X>(xhat) : xhat;
      float2 norm = seen * weight;
      if (cast && a.rounds_product) norm = round_to<X>(norm);
      dgate.set(i, (G::before_norm(a) ? dv * x : dy * norm) * slope);
      dweight.set(i, multiply_add(d, seen, dweight.get(i)));
    });
  }

  // To columns of the group that begins at column `begin`, of a plain kernel or any.
  template <typename Index>
  static __device__ void store(const GatedBackwardArgs& a, int64_t row, int64_t begin, Index col,
                               int count, const XChunk& dx, const OtherChunk& dgate) {
    const int64_t offset = begin + row * a.all_cols;
    if (a.dx.data != nullptr) store_chunk<G::kPlain, X>(a.dx, offset, col, dx, count);
    if (a.dgate.data == nullptr) return;
    if constexpr (G::kPlain) {
      store_chunk<true, X>(a.dgate, offset, col, dgate, count);
    } else {
      with_type(a.dgate.dtype, [&](auto type) {
        store_chunk<false, decltype(type)>(a.dgate, offset, col, dgate, count);
      });
    }
  }

  // The sums for dweight of a block that has these columns.
  static __device__ void store_sums(const GatedBackwardArgs& a, int64_t begin, int col, int count,
                                    const Floats& dweight) {
    if (a.partial != nullptr) {
      float* const sums = a.partial + blockIdx.y * a.all_cols + begin;
      return store_chunk(sums + col, dweight, count, true);
    }
    with_type(a.dweight.dtype, [&](auto type) {
      store_chunk<false, decltype(type)>(a.dweight, begin, col, dweight, count);
    });
  }
};

// The sums for dweight of a block, from those that its slots left in shared memory, row_elems
// apart.
__device__ void sum_group_slots(const GatedBackwardArgs& a, int64_t begin, const float* slot_sums,
                                int row_elems) {
  const int slots = blockDim.y;
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < static_cast<int>(a.cols);
       col += blockDim.x * blockDim.y) {
    float total = 0;
    for (int i = 0; i < slots; ++i) total += slot_sums[i * row_elems + col];
    if (a.partial != nullptr) {
      a.partial[blockIdx.y * a.all_cols + begin + col] = total;
    } else {
      store_any(const_cast<void*>(a.dweight.data), a.dweight.dtype, begin + col, total);
    }
  }
}

// Rows held in registers. Each thread keeps the sums for dweight of its columns.
template <typename X, Order kOrder, int kVectors>
ROW_KERNEL(kGatedBackwardRows, false)
gated_backward_rows(const __grid_constant__ GatedBackwardArgs a) {
  sync_dependent_launch();
  using B = GatedGradient<X, kOrder>;
  using Floats = typename B::Floats;
  constexpr int kElems = B::kElems;
  __shared__ alignas(8) float slot_sums[kTuned.backward_block_threads * kVectors * kElems];
  const int64_t begin = blockIdx.x * a.cols;
  RowGroup<unsigned, 1, kVectors, kElems, GroupBlocks> group{a.rows, static_cast<int>(a.cols),
                                                             false};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  Floats w[kVectors], dweight[kVectors] = {};

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename B::Chunks chunks[kVectors];
    typename B::Stats stats;
    float sum[1] = {};
    group.each_row([&](int, int64_t row) {
      const auto load = [&] {
        const typename B::Source source(a, row, begin);
        each_chunk([&](int k, int col, int count) {
          chunks[k] = B::nothing(a);
          if (count > 0) source.load(col, count, chunks[k]);
        });
      };
      load();
      const float rstd = a.rstd[blockIdx.x * a.rows + row];
      if (turn == 0) B::load_weights(a, begin, each_chunk, w);  // after x, that a row waits for
      stats = B::stats_of(a, row, begin, rstd, load);
      sum[0] = B::dot(a, chunks, w, stats);
    });
    if constexpr (kVectors == 1) {  // of a warp at most
      sum[0] = sum_of_group(sum[0], group.lanes);
    } else {
      row_sum<kThreads<kGatedBackwardRows>>(sum, turn);
    }
    group.each_row([&](int, int64_t row) {
      stats.mean = sum[0] * a.inv_cols;
      each_chunk([&](int k, int col, int count) {
        typename B::XChunk dx;
        typename B::OtherChunk dgate;
        B::finish(a, chunks[k], w[k], stats, dx, dgate, dweight[k]);
        B::store(a, row, begin, col, count, dx, dgate);
        if (kVectors > 1) __syncwarp();  // or both chunks are worked on at once: more registers
      });
    });
  }
  if (!a.wants_sums()) return;
  const int row_elems = group.lanes * kVectors * kElems, slots = blockDim.y;
  each_chunk([&](int k, int col, int count) {
    if (slots == 1) return B::store_sums(a, begin, col, count, dweight[k]);
    float2* const sums = reinterpret_cast<float2*>(slot_sums + group.slot * row_elems + col);
    unrolled<B::kPairs>([&](int i) { sums[i] = dweight[k].get(i); });
  });
  if (slots == 1) return;
  __syncthreads();
  sum_group_slots(a, begin, slot_sums, row_elems);
}

// Longer rows: what is read of them and the sums for dweight are in shared memory, of several
// blocks if need be. They are copied there past the registers; where there is room, the next row
// while one is worked on. A thread reads what it copied itself, so no other waits for it.
template <typename X, Order kOrder>
ROW_KERNEL(kGatedBackwardSharedRows, false)
gated_backward_shared_rows(const __grid_constant__ GatedBackwardArgs a) {
  sync_dependent_launch();
  using B = GatedGradient<X, kOrder>;
  using Floats = typename B::Floats;
  using Chunks = typename B::Chunks;
  using XChunk = typename B::XChunk;
  extern __shared__ uint4 kept_dweight[];
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int, kGatedVectors, B::kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  const int chunks = slice.chunks;
  const auto kept_row = [&](int turn) {
    uint4* const rows = kept_dweight + chunks * Floats::kVectors;
    return rows + (a.keeps_next && turn % 2 ? 3 * chunks : 0);
  };
  const auto copy = [&](int64_t row, int turn) {
    if (row < a.rows) typename B::Source(a, row, begin).copy(slice, kept_row(turn));
    __pipeline_commit();
  };

  slice.each_index([&](int i) { put_chunk(kept_dweight, chunks, i, Floats{}); });
  const float* const rstds = a.rstd + group * a.rows;
  int64_t row = blockIdx.y;
  const int64_t stride = gridDim.y;
  float next_rstd = row < a.rows ? rstds[row] : 1.0f;
  if (a.keeps_next) copy(row, 0);
  for (int turn = 0; row < a.rows; row += stride, ++turn) {
    const float rstd = next_rstd;
    if (row + stride < a.rows) next_rstd = rstds[row + stride];
    a.keeps_next ? copy(row + stride, turn + 1) : copy(row, turn);
    typename B::Stats stats = B::stats_of(a, row, group * a.cols, rstd, [] {});
    a.keeps_next ? __pipeline_wait_prior(1) : __pipeline_wait_prior(0);
    const uint4* const kept = kept_row(turn);
    const auto get = [&](int i) {
      Chunks c{get_chunk<XChunk>(kept, chunks, i), get_chunk<XChunk>(kept + chunks, chunks, i),
               B::no_gate(a)};
      if (a.gate.data != nullptr) c.gate = get_chunk<XChunk>(kept + 2 * chunks, chunks, i);
      return c;
    };
    Sum total;
    for (int first = 0; first < chunks; first += slice.tile) {
      Chunks c[kGatedVectors];
      Floats w[kGatedVectors];
      unrolled<kGatedVectors>([&](int k) { c[k] = B::nothing(a); });
      slice.each_index(first, [&](int k, int i) {
        if (i < chunks) c[k] = get(i);
      });
      B::load_weights(a, begin, [&](const auto& f) { slice.each_chunk(first, f); }, w);
      total = total + Sum(B::dot(a, c, w, stats));
    }
    float sum = total;
    row_sum(sum, cluster, turn);
    stats.mean = sum * a.inv_cols;
    slice.each_index([&](int i) {
      const int col = slice.column(i), count = slice.count(i);
      Floats w[1];
      XChunk dx, dgate;
      B::load_weights(a, begin, [&](const auto& f) { f(0, col, count); }, w);
      Chunks c = get(i);
      auto dweight = get_chunk<Floats>(kept_dweight, chunks, i);
      B::finish(a, c, w[0], stats, dx, dgate, dweight);
      B::store(a, row, begin, col, count, dx, dgate);
      put_chunk(kept_dweight, chunks, i, dweight);
    });
  }
  if (!a.wants_sums()) return;
  slice.each_index([&](int i) {
    B::store_sums(a, begin, slice.column(i), slice.count(i),
                  get_chunk<Floats>(kept_dweight, chunks, i));
  });
}

// All others. A thread adds up the sums of its columns for dweight in memory, where no other does.
template <typename X>
ROW_KERNEL(kGatedBackwardAnyRows, false)
gated_backward_any_rows(const __grid_constant__ GatedBackwardArgs a) {
  sync_dependent_launch();
  using B = GatedGradient<X, Order::kAny>;
  using Floats = typename B::Floats;
  using Chunks = typename B::Chunks;
  extern __shared__ uint4 kept_sums[];
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int64_t, kGatedVectors, B::kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  const int64_t slots = blockDim.y;
  float* const sums = a.shares_sums ? reinterpret_cast<float*>(kept_sums) + threadIdx.y * a.cols
                                    : a.partial + blockIdx.y * a.all_cols + begin;
  const auto each_sum = [&](int64_t i, const auto& f) {
    unrolled<B::kElems>([&](int j) {
      if (j < slice.count(i)) f(j, sums[slice.column(i) + j]);
    });
  };
  if (a.partial != nullptr) {
    slice.each_index([&](int64_t i) { each_sum(i, [](int, float& sum) { sum = 0; }); });
  }
  int turn = 0;
  for (int64_t first = blockIdx.y * slots; first < a.rows; first += gridDim.y * slots, ++turn) {
    // Lanes without a row take part in the shuffles, with what is there of the last one.
    const bool is_there = first + threadIdx.y < a.rows;
    const int64_t row = is_there ? first + threadIdx.y : a.rows - 1;
    const typename B::Source source(a, row, begin);
    typename B::Stats stats =
        B::stats_of(a, row, group * a.cols, a.rstd[group * a.rows + row], [] {});
    const auto load = [&](int64_t i, Chunks& c, Floats& w) {
      Floats weights[1];
      const int count = slice.count(i);
      c = B::nothing(a);
      source.load(slice.column(i), count, c);
      B::load_weights(a, begin, [&](const auto& f) { f(0, slice.column(i), count); }, weights);
      w = weights[0];
    };
    Sum total;
#pragma unroll 1
    for (int64_t tile = slice.lane; tile < slice.chunks; tile += slice.tile) {
      float sum = 0;
#pragma unroll 1
      for (int k = 0; k < kGatedVectors; ++k) {
        const int64_t i = tile + k * slice.lanes;
        if (i >= slice.chunks) break;
        Chunks c[1];
        Floats w[1];
        load(i, c[0], w[0]);
        sum += B::dot(a, c, w, stats);
      }
      total = total + Sum(sum);
    }
    float sum = total;
    if (a.lanes <= kWarp) {
      sum = sum_of_group(sum, a.lanes);
    } else if (slots > 1) {
      float of_slot[] = {sum};
      row_sum<kThreads<kGatedBackwardRows>>(of_slot, turn);
      sum = of_slot[0];
    } else {
      row_sum(sum, cluster, turn);
    }
    stats.mean = sum * a.inv_cols;
    if (!is_there) continue;
    slice.each_index([&](int64_t i) {
      Chunks c;
      Floats w, dweight = {};
      typename B::XChunk dx;
      typename B::OtherChunk dgate;
      load(i, c, w);
      const auto pair = [&](int j) -> uint32_t& { return dweight.word[j]; };
      if (a.partial != nullptr) {
        each_sum(i, [&](int j, float& sum) { pair(j) = __float_as_uint(sum); });
      }
      B::finish(a, c, w, stats, dx, dgate, dweight);
      B::store(a, row, begin, slice.column(i), slice.count(i), dx, dgate);
      if (a.partial != nullptr) {
        each_sum(i, [&](int j, float& sum) { sum = __uint_as_float(pair(j)); });
      }
    });
  }
  if (a.partial == nullptr || !a.shares_sums) return;
  __syncthreads();
  sum_group_slots(a, begin, reinterpret_cast<const float*>(kept_sums), static_cast<int>(a.cols));
}

// Sums for dweight of a launch that is not plain: of several slots they are in shared memory.
int64_t shared_sums(const GatedPlan& plan, int64_t cols) {
  const int64_t slots = plan.threads / plan.lanes;
  return slots > 1 ? slots * cols * int64_t{sizeof(float)} : 0;
}

GatedPlan plan_of(const RmsNormGatedBackward& p, const Device& here) {
  return plan_gated_backward(p.norm.rows, p.groups, p.norm.cols / p.groups, p.norm.x_dtype, here);
}

// f(std::integral_constant of the Order of a plain launch).
template <typename F>
int with_order(bool before, bool cast, const F& f) {
  if (before) return f(std::integral_constant<Order, Order::kBefore>());
  if (cast) return f(std::integral_constant<Order, Order::kBehindCast>());
  return f(std::integral_constant<Order, Order::kBehind>());
}

bool any_in_double(const RmsNormGatedBackward& p) {
  return in_double(p) || is_double(p.norm.dy_dtype);
}

}  // namespace

// Enough for every way, since the pointers may not be known yet.
int64_t rms_norm_gated_backward_workspace(const RmsNormGatedBackward& p) {
  if (any_in_double(p)) return backward_in_double_workspace(p);
  const Device here = device();
  if (p.norm.dweight == nullptr || here.multiprocessors == 0) return 0;
  return plan_of(p, here).group_blocks * p.norm.cols * int64_t{sizeof(float)};
}

int rms_norm_gated_backward(const RmsNormGatedBackward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (any_in_double(p)) return backward_in_double(p, s);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  const RmsNormBackward& norm = p.norm;
  GatedBackwardArgs a{group_args(norm, p.groups), gate_args(p)};
  const Rows dense{1, {}, {norm.cols}};
  a.dy = view_of(norm, norm.dy, norm.dy_dtype, norm.dy_rows);
  a.dx = view_of(norm, norm.dx, norm.x_dtype, dense);
  a.dgate = view_of(norm, p.gate.data != nullptr ? p.dgate : nullptr, p.gate.dtype, dense);
  a.rstd = static_cast<const float*>(norm.rstd);
  a.inv_cols = static_cast<float>(1.0 / static_cast<double>(a.cols));
  // Of a gate before the norm dweight takes what is not rounded, as the CPU's kernels do.
  a.cast_before_weight = norm.cast_before_weight && norm.weight != nullptr && !a.before_norm;
  const bool whole = p.groups == 1 || a.cols % vector_elems(norm.x_dtype) == 0;
  align_groups(whole, a.x, a.gate, a.dy, a.dx, a.dgate, a.weight);
  GatedPlan plan = plan_of(p, here);
  const bool plain = plan.keep != Keep::kNowhere && is_plain(a, a.gate, a.dy, a.dx, a.dgate);
  lay_out(a, plan);
  const int64_t chunks = plan.slice / vector_elems(norm.x_dtype);
  a.keeps_next = plan.shared_bytes > chunks * gated_backward_kept_bytes(norm.x_dtype);
  if (norm.dweight != nullptr && plain && plan.group_blocks == 1) {
    a.dweight = view_of(norm, norm.dweight, norm.w_dtype, Rows{1, {}, {0}});
  } else if (norm.dweight != nullptr) {
    a.partial = static_cast<float*>(norm.workspace);
  }
  const int error = with_type(norm.x_dtype, [&](auto x) {
    using X = decltype(x);
    if (plain) {
      return with_order(a.before_norm, a.cast_before_weight, [&](auto order) {
        constexpr Order kOrder = decltype(order)::value;
        void (*kernel)(GatedBackwardArgs) = plan.keep == Keep::kShared
                                                ? gated_backward_shared_rows<X, kOrder>
                                            : plan.vectors == 1 ? gated_backward_rows<X, kOrder, 1>
                                                                : gated_backward_rows<X, kOrder, 2>;
        return launch_groups(kernel, plan, p.groups, a, s);
      });
    }
    plan = of_any_rows(plan, tuning_of(here.arch).limits[kGatedBackwardAnyRows], here);
    if (a.partial != nullptr) plan.shared_bytes = shared_sums(plan, a.cols);
    a.shares_sums = plan.shared_bytes > 0;
    return launch_groups(gated_backward_any_rows<X>, plan, p.groups, a, s);
  });
  if (error != 0 || a.partial == nullptr) return error;
  const PartialSums sums{a.partial, plan.group_blocks, norm.cols, norm.dweight, norm.w_dtype};
  return sum_partials(&sums, 1, s);
}

}  // namespace rmsnorm::cuda

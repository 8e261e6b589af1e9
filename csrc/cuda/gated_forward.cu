// y = norm(x) * act(gate) or norm(x * act(gate)), of groups of columns: see gated.cuh.
#include "gated.cuh"
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

struct GatedArgs : RowArgs, GateArgs {
  View y;
  float* rstd;  // [groups, rows]
  Mean mean;
};

template <typename X, Order kOrder>
struct GatedNorm : Gated<X, kOrder> {
  using G = Gated<X, kOrder>;
  using typename G::Floats;
  static constexpr int kPairs = G::kPairs;

  // What is normalized, and what the norm is multiplied by.
  static __device__ void activate(const GatedArgs& a, const typename G::XChunk& x,
                                  const typename G::OtherChunk& gate, Floats& v, Floats& factor) {
    unrolled<kPairs>([&](int i) {
      const float2 activated = G::activated(a, gate.get(i));
      v.set(i, G::times_before(a, x.get(i), activated));
      factor.set(i, activated);
    });
  }

  // Of fp32 a Sum; see Norm in norm.cuh.
  template <int kChunks>
  static __device__ Total<X> sum_of_squares(const Floats (&v)[kChunks]) {
    return tree_sum<kChunks * kPairs>([&](int i) {
      const float2 u = v[i / kPairs].get(i % kPairs);
      if constexpr (sizeof(X) == 4) {
        return Sum::of_square(u.x) + Sum::of_square(u.y);
      } else {
        return __fmaf_rn(u.y, u.y, __fmul_rn(u.x, u.x));
      }
    });
  }

  // group: its index; lane: of the row, or -1 if the thread stands for a row that is not there.
  static __device__ Scale scale(const GatedArgs& a, const Total<X>& sum, int64_t group, int64_t row,
                                const typename G::Place& place, const Cluster& cluster, int lane) {
    Scale s;
    if (!fast_scale(sum, a.mean, s)) {
      s = G::rescued(a, a, place);
      // Its warps read all of the row, and y may be x.
      if (a.lanes > kWarp) cluster.barrier();
    }
    if (a.rstd != nullptr && lane == 0 && cluster.rank == 0) {
      a.rstd[group * a.rows + row] = s.hi * s.pre;
    }
    return s;
  }

  template <bool kCast>
  static __device__ Floats norm(const GatedArgs& a, const Floats& v, const Floats& factor,
                                const Floats& w, const Scale& s) {
    Floats y;
    unrolled<kPairs>([&](int i) {
      float2 n = normalized<X, kCast>(v.get(i), w.get(i), s);
      if (kCast && a.rounds_product) n = round_to<X>(n);
      y.set(i, G::times_behind(a, n, factor.get(i)));
    });
    return y;
  }
};

// Of a block, which has several rows of fewer vectors.
constexpr int threads_with(int vectors) {
  return vectors < kGatedVectors ? kTuned.forward_block_threads : kTuned.limits[kGatedRows].threads;
}

// Rows held in registers, kVectors chunks of x and of the gate per thread.
template <typename X, Order kOrder, int kVectors>
__global__ void __launch_bounds__(threads_with(kVectors), blocks_of(kTuned.limits[kGatedRows],
                                                                    false, threads_with(kVectors)))
    gated_rows(const __grid_constant__ GatedArgs a) {
  sync_dependent_launch();
  using N = GatedNorm<X, kOrder>;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems, kRows = kGatedVectors / kVectors;
  const Cluster alone(1);
  const int64_t begin = blockIdx.x * a.cols;
  RowGroup<unsigned, kRows, kVectors, kElems, GroupBlocks> group{a.rows, static_cast<int>(a.cols),
                                                                 kRows == 1};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  Floats w[kVectors];

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename N::XChunk x[kRows][kVectors] = {}, gate[kRows][kVectors];
    Total<X> sum[kRows];
    unrolled<kRows * kVectors>([&](int i) { gate[i / kVectors][i % kVectors] = N::no_gate(a); });
    group.each_row_or_none([&](int r, int64_t row, bool is_there) {
      const typename N::Place place(a, a, row, begin);
      const auto load = [&](const View& from, int64_t offset, auto& to) {
        group.each_chunk(
            [&](int k, int col, int count) {
              to[k] = load_chunk<true, X, kElems>(from, offset, col, count);
            },
            is_there);
      };
      load(a.x, place.x, x[r]);
      if (a.gate.data != nullptr) load(a.gate, place.gate, gate[r]);
    });
    if (turn == 0) N::load_weights(a, begin, each_chunk, w);  // after x, that a row waits for
    Floats v[kRows][kVectors], factor[kRows][kVectors];
    unrolled<kRows>([&](int r) {
      unrolled<kVectors>(
          [&](int k) { N::activate(a, x[r][k], gate[r][k], v[r][k], factor[r][k]); });
      sum[r] = N::sum_of_squares(v[r]);
    });
    row_sum<kThreads<kGatedRows>>(sum, turn);
    group.each_row([&](int r, int64_t row) {
      const typename N::Place place(a, a, row, begin);
      const Scale s = N::scale(a, sum[r], blockIdx.x, row, place, alone, group.lane);
      const int64_t offset = begin + a.y.offset<true>(row);
      with_choice(a.cast_before_weight, [&](auto cast) {
        with_scale<true>(s, [&](const Scale& s) {
          each_chunk([&](int k, int col, int count) {
            const Floats y =
                N::template norm<decltype(cast)::value>(a, v[r][k], factor[r][k], w[k], s);
            store_chunk<true, X>(a.y, offset, col, y, count);
          });
        });
      });
    });
  }
}

// Longer rows, in shared memory, by several blocks if need be: x and the gate or, of a gate before
// the norm, their product.
template <typename X, Order kOrder>
ROW_KERNEL(kGatedSharedRows, false)
gated_shared_rows(const __grid_constant__ GatedArgs a) {
  sync_dependent_launch();
  using N = GatedNorm<X, kOrder>;
  using XChunk = typename N::XChunk;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int, kGatedVectors, kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  int turn = 0;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y, ++turn) {
    const typename N::Place place(a, a, row, begin);
    Sum total;
    for (int first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kGatedVectors], gate[kGatedVectors];
      slice.each_chunk(first, [&](int k, int col, int count) {
        gate[k] = N::no_gate(a);
        x[k] = load_chunk<true, X, kElems>(a.x, place.x, col, count);
        if (a.gate.data != nullptr) {
          gate[k] = load_chunk<true, X, kElems>(a.gate, place.gate, col, count);
        }
      });
      Floats v[kGatedVectors], factor;
      unrolled<kGatedVectors>([&](int k) { N::activate(a, x[k], gate[k], v[k], factor); });
      total = total + Sum(N::sum_of_squares(v));
      slice.each_index(first, [&](int k, int i) {
        if (i >= slice.chunks) return;
        if constexpr (kOrder == Order::kBefore) {
          put_chunk(kept, slice.chunks, i, v[k]);
        } else {
          put_chunk(kept, slice.chunks, i, x[k]);
          put_chunk(kept + slice.chunks, slice.chunks, i, gate[k]);
        }
      });
    }
    Total<X> sum = total;
    row_sum(sum, cluster, turn);
    const typename N::Place whole(a, a, row, group * a.cols);
    const Scale s = N::scale(a, sum, group, row, whole, cluster, slice.lane);
    const int64_t offset = begin + a.y.offset<true>(row);
    slice.each_index([&](int i) {
      Floats v, factor, w[1];
      N::load_weights(a, begin, [&](const auto& f) { f(0, slice.column(i), slice.count(i)); }, w);
      if constexpr (kOrder == Order::kBefore) {
        v = get_chunk<Floats>(kept, slice.chunks, i);
      } else {
        N::activate(a, get_chunk<XChunk>(kept, slice.chunks, i),
                    get_chunk<XChunk>(kept + slice.chunks, slice.chunks, i), v, factor);
      }
      with_choice(a.cast_before_weight, [&](auto cast) {
        const Floats y = N::template norm<decltype(cast)::value>(a, v, factor, w[0], s);
        store_chunk<true, X>(a.y, offset, slice.column(i), y, slice.count(i));
      });
    });
  }
}

// All others.
template <typename X>
ROW_KERNEL(kGatedAnyRows, false)
gated_any_rows(const __grid_constant__ GatedArgs a) {
  sync_dependent_launch();
  using N = GatedNorm<X, Order::kAny>;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems;
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int64_t, kGatedVectors, kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  const int64_t slots = blockDim.y;
  int turn = 0;
  for (int64_t first = blockIdx.y * slots; first < a.rows; first += gridDim.y * slots, ++turn) {
    // Lanes without a row take part in the shuffles, with what is there of the last one.
    const bool is_there = first + threadIdx.y < a.rows;
    const int64_t row = is_there ? first + threadIdx.y : a.rows - 1;
    const typename N::Place place(a, a, row, begin);
    const auto load = [&](int64_t i, Floats& v, Floats& factor) {
      const auto x = load_chunk<false, X, kElems>(a.x, place.x, slice.column(i), slice.count(i));
      typename N::OtherChunk gate = N::no_gate(a);
      if (a.gate.data != nullptr) {
        gate =
            load_chunk<false, float, kElems>(a.gate, place.gate, slice.column(i), slice.count(i));
      }
      N::activate(a, x, gate, v, factor);
    };
    Sum total;
#pragma unroll 1
    for (int64_t tile = slice.lane; tile < slice.chunks; tile += slice.tile) {
      Total<X> sum{};
#pragma unroll 1
      for (int k = 0; k < kGatedVectors; ++k) {
        const int64_t i = tile + k * slice.lanes;
        if (i >= slice.chunks) break;
        Floats v[1], factor;
        load(i, v[0], factor);
        sum = sum + N::sum_of_squares(v);
      }
      total = total + Sum(sum);
    }
    Total<X> sum = total;
    if (a.lanes > kWarp) {
      row_sum(sum, cluster, turn);
    } else {
      sum = sum_of_group(sum, a.lanes);
    }
    const typename N::Place whole(a, a, row, group * a.cols);
    const Scale s = N::scale(a, sum, group, row, whole, cluster, is_there ? slice.lane : -1);
    if (!is_there) continue;
    const int64_t offset = begin + a.y.offset<false>(row);
    slice.each_index([&](int64_t i) {
      Floats v, factor, w[1], y;
      const int count = slice.count(i);
      load(i, v, factor);
      N::load_weights(a, begin, [&](const auto& f) { f(0, slice.column(i), count); }, w);
      with_choice(a.cast_before_weight, [&](auto cast) {
        y = N::template norm<decltype(cast)::value>(a, v, factor, w[0], s);
      });
      const auto write = [&](auto type) {
        store_chunk<false, decltype(type)>(a.y, offset, slice.column(i), y, count);
      };
      a.y.dtype == DType::kFloat32 ? write(float()) : write(X());
    });
  }
}

}  // namespace

int rms_norm_gated_forward(const RmsNormGated& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_double(p)) return forward_in_double(p, s);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  const RmsNormForward& norm = p.norm;
  GatedArgs a{group_args(norm, p.groups), gate_args(p)};
  a.y = view_of(norm, norm.y, norm.y_dtype, norm.y_rows);
  a.rstd = static_cast<float*>(norm.rstd);
  a.mean = mean_of(a.cols, norm.eps);
  // Without a weight there is nothing between the roundings.
  a.cast_before_weight = norm.cast_before_weight && norm.weight != nullptr;
  const bool whole = p.groups == 1 || a.cols % vector_elems(norm.x_dtype) == 0;
  align_groups(whole, a.x, a.gate, a.y, a.weight);
  const bool plain = is_plain(a, a.gate, a.y);
  GatedPlan plan = plan_gated_forward(norm.rows, p.groups, a.cols, norm.x_dtype, here);
  lay_out(a, plan);
  return with_type(norm.x_dtype, [&](auto x) {
    using X = decltype(x);
    if (plain && plan.keep != Keep::kNowhere) {
      return with_flag(a.before_norm, [&](auto before) {
        constexpr Order kOrder = decltype(before)::value ? Order::kBefore : Order::kBehind;
        void (*kernel)(GatedArgs) = plan.keep == Keep::kShared ? gated_shared_rows<X, kOrder>
                                    : plan.vectors == 1        ? gated_rows<X, kOrder, 1>
                                                               : gated_rows<X, kOrder, 2>;
        return launch_groups(kernel, plan, p.groups, a, s);
      });
    }
    plan = of_any_rows(plan, tuning_of(here.arch).limits[kGatedAnyRows], here);
    return launch_groups(gated_any_rows<X>, plan, p.groups, a, s);
  });
}

}  // namespace rmsnorm::cuda

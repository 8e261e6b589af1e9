// From x and a gate to a norm, of groups of columns: what gated_forward.cu and gated_quant.cu
// share.
#pragma once
#include "gated.cuh"
#include "norm.cuh"

namespace rmsnorm::cuda {

struct GatedNormArgs : RowArgs, GateArgs {
  View y;
  float* rstd;  // [groups, rows]
  Mean mean;
};

// Rows in 8 bits: gated_quant.cu.
int launch_gated_quant(const RmsNormGated& p, const GatedNormArgs& args, bool plain,
                       const Device& here, cudaStream_t stream);

template <typename XType, Order kOrder>
struct GatedNorm : Gated<XType, kOrder> {
  using X = XType;
  using G = Gated<X, kOrder>;
  using typename G::Floats;
  static constexpr Order kGateOrder = kOrder;
  static constexpr int kElems = G::kElems, kPairs = G::kPairs;
  using Y = std::conditional_t<G::kPlain, X, float>;  // in which y is held, as in Norm
  using YChunk = Chunk<Y, kElems>;
  using LargestY = Largest<Y>;

  // What is normalized, and what the norm is multiplied by.
  static __device__ void activate(const GatedNormArgs& a, const typename G::XChunk& x,
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
  static __device__ Scale scale(const GatedNormArgs& a, const Total<X>& sum, int64_t group,
                                int64_t row, const typename G::Place& place, const Cluster& cluster,
                                int lane) {
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

  // y, rounded to its type.
  template <bool kCast>
  static __device__ YChunk norm(const GatedNormArgs& a, const Floats& v, const Floats& factor,
                                const Floats& w, const Scale& s) {
    YChunk y;
    unrolled<kPairs>([&](int i) {
      float2 n = normalized<X, kCast>(v.get(i), w.get(i), s);
      if (kCast && a.rounds_product) n = round_to<X>(n);
      n = G::times_behind(a, n, factor.get(i));
      if (!G::kPlain && a.y.dtype == a.x.dtype) n = round_to<X>(n);
      y.set(i, n);
    });
    return y;
  }

  template <typename Index>
  static __device__ void store(const GatedNormArgs& a, int64_t offset, Index col, int count,
                               const YChunk& y) {
    const auto write = [&](auto type) {
      store_chunk<G::kPlain, decltype(type)>(a.y, offset, col, y, count);
    };
    if constexpr (G::kPlain) {
      write(X());
    } else {
      a.y.dtype == DType::kFloat32 ? write(float()) : write(X());
    }
  }
};

// Of a block, which has several rows of fewer vectors.
constexpr int gated_threads(int vectors) {
  return vectors < kGatedVectors ? kTuned.forward_block_threads : kTuned.limits[kGatedRows].threads;
}
#define GATED_ROW_KERNEL(kernel, vectors) \
  __global__ void __launch_bounds__(      \
      gated_threads(vectors), blocks_of(kTuned.limits[kernel], false, gated_threads(vectors)))

// The kernels of rows differ in their epilogue E, as those of norm.cuh do; its E::N is a GatedNorm.
// They are laid out alike, so that a norm that is quantized has the bits of one that is not.

// Rows held in registers, kVectors chunks of x and of the gate per thread.
template <typename E, int kVectors>
__device__ void gated_norm_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  using X = typename N::X;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems, kRows = kGatedVectors / kVectors;
  // Of two rows that are to be quantized x stays packed: in fp32 they would take too many
  // registers.
  constexpr bool kUnpacksTwice =
      E::kFindsLargest && kRows > 1 && N::kGateOrder == Order::kBehind && sizeof(X) == 2;
  const Cluster alone(1);
  const int64_t begin = blockIdx.x * a.cols;
  RowGroup<unsigned, kRows, kVectors, kElems, GroupBlocks> group{a.rows, static_cast<int>(a.cols),
                                                                 kRows == 1};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  Floats w[kVectors];
  E epilogue;

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
    if (turn == 0) {  // after x, that a row waits for
      N::load_weights(a, begin, each_chunk, w);
      epilogue.prepare(a);
    }
    Floats v[kRows][kVectors], factor[kRows][kVectors];
    unrolled<kRows>([&](int r) {
      unrolled<kVectors>(
          [&](int k) { N::activate(a, x[r][k], gate[r][k], v[r][k], factor[r][k]); });
      sum[r] = N::sum_of_squares(v[r]);
    });
    row_sum<kThreads<kGatedRows>>(sum, turn);
    // f(k, column, count, y) for the chunks of a row.
    const auto each_norm = [&](int r, int64_t row, const auto& f) {
      const typename N::Place place(a, a, row, begin);
      const Scale s = N::scale(a, sum[r], blockIdx.x, row, place, alone, group.lane);
      with_choice(a.cast_before_weight, [&](auto cast) {
        with_scale<true>(s, [&](const Scale& s) {
          each_chunk([&](int k, int col, int count) {
            Floats chunk = v[r][k];
            if constexpr (kUnpacksTwice) {
              x[r][k].stay_packed();
              chunk = x[r][k].template to<float>();
            }
            f(k, col, count,
              N::template norm<decltype(cast)::value>(a, chunk, factor[r][k], w[k], s));
          });
        });
      });
    };
    if constexpr (E::kFindsLargest) {
      typename N::YChunk y[kRows][kVectors];
      typename N::LargestY largest[kRows];
      group.each_row([&](int r, int64_t row) {
        each_norm(r, row, [&](int k, int, int, const typename N::YChunk& chunk) {
          y[r][k] = chunk;
          if (a.per_token) largest[r].take(chunk);
        });
      });
      if (a.per_token) row_sum<kThreads<kGatedRows>>(largest, ++turn);
      group.each_row([&](int r, int64_t row) {
        typename E::Place place(epilogue, a, row, begin, largest[r], group.lane == 0);
        place.store(each_chunk, y[r]);
      });
    } else {
      group.each_row([&](int r, int64_t row) {
        const typename E::Place place(a, row, begin);
        each_norm(r, row, [&](int, int col, int count, const typename N::YChunk& y) {
          place.store(col, count, y);
        });
      });
    }
  }
}

// Longer rows, in shared memory, by several blocks if need be: x and the gate or, of a gate before
// the norm, their product.
template <typename E>
__device__ void gated_norm_shared_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  using X = typename N::X;
  using YChunk = typename N::YChunk;
  using XChunk = typename N::XChunk;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int, kGatedVectors, kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  E epilogue;
  epilogue.prepare(a);
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
        if constexpr (N::kGateOrder == Order::kBefore) {
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
    // f(chunk, y) for all that a thread has.
    const auto each_norm = [&](const auto& f) {
      slice.each_index([&](int i) {
        Floats v, factor, w[1];
        N::load_weights(a, begin, [&](const auto& f) { f(0, slice.column(i), slice.count(i)); }, w);
        if constexpr (N::kGateOrder == Order::kBefore) {
          v = get_chunk<Floats>(kept, slice.chunks, i);
        } else {
          N::activate(a, get_chunk<XChunk>(kept, slice.chunks, i),
                      get_chunk<XChunk>(kept + slice.chunks, slice.chunks, i), v, factor);
        }
        with_choice(a.cast_before_weight, [&](auto cast) {
          f(i, N::template norm<decltype(cast)::value>(a, v, factor, w[0], s));
        });
      });
    };
    if constexpr (E::kFindsLargest) {
      typename N::LargestY largest;
      if (a.per_token) {
        each_norm([&](int i, const YChunk& y) {
          largest.take(y);
          put_chunk(kept, slice.chunks, i, y);  // in the place of what it was made of
        });
        row_sum(largest, cluster, ++turn);
      }
      const typename E::Place place(epilogue, a, row, begin, largest,
                                    slice.lane == 0 && cluster.rank == 0);
      if (a.per_token) {
        slice.each_index([&](int i) {
          place.store(slice.column(i), slice.count(i), get_chunk<YChunk>(kept, slice.chunks, i));
        });
      } else {
        each_norm([&](int i, const YChunk& y) { place.store(slice.column(i), slice.count(i), y); });
      }
    } else {
      const typename E::Place place(a, row, begin);
      each_norm([&](int i, const YChunk& y) { place.store(slice.column(i), slice.count(i), y); });
    }
  }
}

// All others.
template <typename E>
__device__ void gated_norm_any_rows(const typename E::Args& a) {
  sync_dependent_launch();
  using N = typename E::N;
  using X = typename N::X;
  using YChunk = typename N::YChunk;
  using Floats = typename N::Floats;
  constexpr int kElems = N::kElems;
  const Cluster cluster(a.cluster);
  const int64_t group = blockIdx.x / cluster.size, first_col = cluster.rank * a.slice;
  const int64_t begin = group * a.cols + first_col;
  const Slice<int64_t, kGatedVectors, kElems> slice{first_col, min(a.cols, first_col + a.slice)};
  const int64_t slots = blockDim.y;
  E epilogue;
  epilogue.prepare(a);
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
    // f(chunk, y) for all that a thread has.
    const auto each_norm = [&](const auto& f) {
      slice.each_index([&](int64_t i) {
        Floats v, factor, w[1];
        load(i, v, factor);
        N::load_weights(a, begin, [&](const auto& f) { f(0, slice.column(i), slice.count(i)); }, w);
        YChunk y;
        with_choice(a.cast_before_weight, [&](auto cast) {
          y = N::template norm<decltype(cast)::value>(a, v, factor, w[0], s);
        });
        f(i, y);
      });
    };
    const auto store_to = [&](const auto& place) {
      if (!is_there) return;
      each_norm(
          [&](int64_t i, const YChunk& y) { place.store(slice.column(i), slice.count(i), y); });
    };
    if constexpr (E::kFindsLargest) {
      typename N::LargestY largest;
      if (a.per_token) {
        each_norm([&](int64_t, const YChunk& y) { largest.take(y); });
        if (a.lanes > kWarp) {
          row_sum(largest, cluster, ++turn);
        } else {
          largest = sum_of_group(largest, a.lanes);
        }
      }
      const bool first = is_there && slice.lane == 0 && cluster.rank == 0;
      store_to(typename E::Place(epilogue, a, row, begin, largest, first));
    } else {
      store_to(typename E::Place(a, row, begin));
    }
  }
}

// ---------------------------------------------------------------- launches

inline GatedNormArgs gated_norm_args(const RmsNormGated& p) {
  const RmsNormForward& norm = p.norm;
  GatedNormArgs a{group_args(norm, p.groups), gate_args(p)};
  a.y = view_of(norm, norm.y, norm.y_dtype, norm.y_rows);
  a.rstd = static_cast<float*>(norm.rstd);
  a.mean = mean_of(a.cols, norm.eps);
  // Without a weight there is nothing between the roundings.
  a.cast_before_weight = norm.cast_before_weight && norm.weight != nullptr;
  align_groups(has_whole_groups(p), a.x, a.gate, a.y, a.weight);
  return a;
}

}  // namespace rmsnorm::cuda

// sum = residual + norm(x), and y = norm(sum). The norms have the bits of forward.cu: rows are laid
// out as there, and summed up in the same order.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

struct SandwichArgs {
  NormArgs norm;  // of x; y.dtype is what it is rounded to, before it is added
  NormArgs next;  // of the sum, its x, of the residual and of its input, which is norm.x
  bool has_y, scales;
  float factor;  // of the sum; the product is rounded again
};

// T: the type of the residual and of the sum.
template <typename T, typename N, int kElems>
__device__ Chunk<T, kElems> sum_of(const SandwichArgs& a, const Chunk<N, kElems>& norm,
                                   const Chunk<T, kElems>& residual) {
  Chunk<T, kElems> sum;
  unrolled<kElems / 2>([&](int i) {
    const float2 n = norm.get(i), r = residual.get(i);
    // Not contracted with a product in the norm of fp32.
    sum.set(i, {__fadd_rn(n.x, r.x), __fadd_rn(n.y, r.y)});
    if (a.scales) sum.set(i, sum.get(i) * a.factor);
  });
  return sum;
}

// f(a Norm of plain rows, its Scale): what is known of both is known to the compiler.
template <typename X, typename F>
__device__ void with_plain(const NormArgs& a, const Scale& s, const F& f) {
  with_choice(a.cast_before_weight, [&](auto cast) {
    constexpr Form kForm = decltype(cast)::value ? Form::kPlainCast : Form::kPlain;
    with_scale<true>(s, [&](const Scale& s) { f(Norm<X, kForm, true>(), s); });
  });
}

// Plain rows in registers: the sum takes the place of x.
template <typename X, int kVectors>
SHORT_ROW_KERNEL(kSandwichRows, kVectors, false)
sandwich_rows(const __grid_constant__ SandwichArgs a) {
  sync_dependent_launch();
  using First = Norm<X, Form::kPlain, false>;
  using Next = Norm<X, Form::kPlain, true>;
  constexpr int kRows = kForwardVectors / kVectors, kMostThreads = kThreads<kSandwichRows>;
  const Cluster alone(1);
  RowGroup<unsigned, kRows, kVectors, Next::kElems> group{
      a.norm.rows, static_cast<int>(a.norm.cols), kRows == 1};
  const auto each_chunk = [&](const auto& f) { group.each_chunk(f); };
  typename Next::WChunk w[kVectors], next_w[kVectors];

  for (int turn = 0; group.any(); group.advance()) {
    typename Next::XChunk x[kRows][kVectors] = {}, residual[kRows][kVectors] = {};
    Total<X> sum[kRows];
    const auto load = [&](int r, int64_t row, const auto& each) {
      Next::load(a.next, row, 0, each, residual[r], x[r]);
    };
    group.each_row_or_none([&](int r, int64_t row, bool is_there) {
      load(r, row, [&](const auto& f) { group.each_chunk(f, is_there); });
    });
    if (turn == 0) {  // after x, that a row waits for
      load_weights<true>(a.norm, 0, each_chunk, w);
      load_weights<true>(a.next, 0, each_chunk, next_w);
    }
    unrolled<kRows>([&](int r) { sum[r] = First::sum_of_squares(x[r]); });
    row_sum<kMostThreads>(sum, turn++);
    group.each_row([&](int r, int64_t row) {
      const Scale s =
          First::scale(a.norm, sum[r], row, alone, group.lane, [&] { load(r, row, each_chunk); });
      const int64_t offset = a.next.x.offset<true>(row);
      with_plain<X>(a.norm, s, [&](auto norm, const Scale& s) {
        each_chunk([&](int k, int col, int count) {
          x[r][k] = sum_of(a, norm.norm(a.norm, x[r][k], w[k], s), residual[r][k]);
          store_chunk<true, X>(a.next.x, offset, col, x[r][k], count);
        });
      });
    });
    if (!a.has_y) continue;
    unrolled<kRows>([&](int r) { sum[r] = Next::sum_of_squares(x[r]); });
    row_sum<kMostThreads>(sum, turn++);
    group.each_row([&](int r, int64_t row) {
      const Scale s = Next::scale(a.next, sum[r], row, alone, group.lane,
                                  [&] { Next::load_again(a.next, row, 0, each_chunk, x[r]); });
      const int64_t offset = a.next.y.offset<true>(row);
      with_plain<X>(a.next, s, [&](auto norm, const Scale& s) {
        each_chunk([&](int k, int col, int count) {
          norm.store(a.next, offset, col, count, norm.norm(a.next, x[r][k], next_w[k], s));
        });
      });
    });
  }
}

// Longer plain rows, in shared memory, by several blocks if need be. The residual is read when x is
// complete: then the sum takes its place.
template <typename X>
ROW_KERNEL(kSandwichSharedRows, false)
sandwich_shared_rows(const __grid_constant__ SandwichArgs a) {
  sync_dependent_launch();
  using First = Norm<X, Form::kPlain, false>;
  using Next = Norm<X, Form::kPlain, true>;
  using XChunk = typename Next::XChunk;
  constexpr int kElems = Next::kElems;
  extern __shared__ uint4 kept[];
  const Cluster cluster(a.norm.cluster);
  const int64_t begin = cluster.rank * a.norm.slice;
  const Slice<int, kForwardVectors, kElems> slice{begin, min(a.norm.cols, begin + a.norm.slice)};
  const auto weights = [&](const NormArgs& of, int i) {
    typename Next::WChunk w[1];
    load_weights<true>(of, begin, [&](const auto& f) { f(0, slice.column(i), slice.count(i)); }, w);
    return w[0];
  };
  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.norm.rows;
       row += gridDim.x / cluster.size) {
    Sum total;
    for (int first = 0; first < slice.chunks; first += slice.tile) {
      XChunk x[kForwardVectors];
      First::load_again(a.norm, row, begin, [&](const auto& f) { slice.each_chunk(first, f); }, x);
      total = total + Sum(First::sum_of_squares(x));
      slice.each_index(first, [&](int k, int i) {
        if (i < slice.chunks) put_chunk(kept, slice.chunks, i, x[k]);
      });
    }
    Total<X> sum = total;
    row_sum(sum, cluster, turn++);
    Scale s = First::scale(a.norm, sum, row, cluster, slice.lane, [] {});
    total = {};
    const int64_t offset = begin + a.next.x.offset<true>(row);
    const int64_t residual_offset = begin + a.next.residual.offset<true>(row);
    with_plain<X>(a.norm, s, [&](auto norm, const Scale& s) {
      for (int first = 0; first < slice.chunks; first += slice.tile) {
        XChunk v[kForwardVectors];  // the residual, then the sum
        slice.each_chunk(first, [&](int k, int col, int count) {
          v[k] = load_chunk<true, X, kElems>(a.next.residual, residual_offset, col, count);
        });
        unrolled<kForwardVectors>([&](int k) {
          const int i = first + k * slice.lanes + recomputed(slice.lane);
          if (i >= slice.chunks) return;
          XChunk x = get_chunk<XChunk>(kept, slice.chunks, i);
          v[k] = sum_of(a, norm.norm(a.norm, x, weights(a.norm, i), s), v[k]);
          store_chunk<true, X>(a.next.x, offset, slice.column(i), v[k], slice.count(i));
          put_chunk(kept, slice.chunks, i, v[k]);
        });
        total = total + Sum(Next::sum_of_squares(v));
      }
    });
    if (!a.has_y) continue;
    sum = total;
    row_sum(sum, cluster, turn++);
    s = Next::scale(a.next, sum, row, cluster, slice.lane, [] {});
    const int64_t y_offset = begin + a.next.y.offset<true>(row);
    with_plain<X>(a.next, s, [&](auto norm, const Scale& s) {
      slice.each_index([&](int i) {
        XChunk x = get_chunk<XChunk>(kept, slice.chunks, i);
        norm.store(a.next, y_offset, slice.column(i), slice.count(i),
                   norm.norm(a.next, x, weights(a.next, i), s));
      });
    });
  }
}

// All others. A sum in fp32 beside narrower x is summed up as such, in chunks of x.
template <typename X>
ROW_KERNEL(kSandwichAnyRows, false)
sandwich_any_rows(const __grid_constant__ SandwichArgs a) {
  sync_dependent_launch();
  using First = Norm<X, Form::kAny, false>;
  constexpr int kElems = First::kElems;
  const Cluster cluster(a.norm.cluster);
  const int64_t begin = cluster.rank * a.norm.slice;
  const Slice<int64_t, kForwardVectors, kElems> slice{begin,
                                                      min(a.norm.cols, begin + a.norm.slice)};
  const auto weights = [&](const NormArgs& of, int64_t col, int count) {
    Chunk<float, kElems> w[1];
    load_weights<false>(of, begin, [&](const auto& f) { f(0, col, count); }, w);
    return w[0];
  };
  int turn = 0;
  const auto sum_over_row = [&](auto& v) {
    if (a.norm.lanes > kWarp) {
      row_sum(v, cluster, turn++);
    } else {
      v = sum_of_group(v, a.norm.lanes);
    }
  };
  const int64_t slots = blockDim.y, apart = gridDim.x / cluster.size * slots;
  for (int64_t row = blockIdx.x / cluster.size * slots + threadIdx.y;
       row - threadIdx.y < a.norm.rows; row += apart) {
    // Lanes without a row take part in the shuffles, with zeros.
    const bool is_there = row < a.norm.rows;
    const auto chunks_from = [&](int64_t first) {
      return [&, first](const auto& f) {
        slice.each_chunk(first,
                         [&](int k, int64_t col, int count) { f(k, col, is_there ? count : 0); });
      };
    };
    const auto load_x = [&](int64_t first, auto& x) {
      First::load_again(a.norm, row, begin, chunks_from(first), x);
    };
    Sum total;
#pragma unroll 1
    for (int64_t first = 0; first < slice.chunks; first += slice.tile) {
      typename First::XChunk x[kForwardVectors];
      load_x(first, x);
      total = total + Sum(First::sum_of_squares(x));
    }
    Total<X> sum = total;
    sum_over_row(sum);
    Scale s{};
    if (is_there) s = First::scale(a.norm, sum, row, cluster, slice.lane, [] {});
    const int64_t x_offset = begin + a.norm.x.offset<false>(row);
    const auto with_sum_type = [&](auto type) {
      using T = decltype(type);
      using Next = Norm<T, Form::kAny, true>;
      const T* const residual =
          static_cast<const T*>(a.next.residual.data) + begin + a.next.residual.offset<false>(row);
      T* const sums =
          static_cast<T*>(const_cast<void*>(a.next.x.data)) + begin + a.next.x.offset<false>(row);
      Sum total;
#pragma unroll 1
      for (int64_t first = slice.lane; first < slice.chunks; first += slice.tile) {
        Total<T> tile{}, pair{};
#pragma unroll 1
        for (int k = 0; k < kForwardVectors; ++k) {
          const int64_t i = first + k * slice.lanes, col = slice.column(i);
          const int count = is_there ? slice.count(i) : 0;
          if (count > 0) {
            auto x = load_chunk<false, X, kElems>(a.norm.x, x_offset, col, count);
            Chunk<T, kElems> v[1] = {
                load_chunk<T, kElems>(residual + col, count, a.next.residual.aligned)};
            v[0] = sum_of(a, First::norm(a.norm, x, weights(a.norm, col, count), s), v[0]);
            store_chunk(sums + col, v[0], count, a.next.x.aligned);
            pair = pair + Next::sum_of_squares(v);
          }
          if (k % 2 == 0) continue;  // two and two, as a tree
          tile = tile + pair;
          pair = {};
        }
        total = total + Sum(tile);
      }
      if (!a.has_y) return;
      Total<T> sum = total;
      sum_over_row(sum);
      if (!is_there) return;
      const Scale s = Next::scale(a.next, sum, row, cluster, slice.lane, [] {});
      const int64_t offset = begin + a.next.y.offset<false>(row);
      slice.each_index([&](int64_t i) {
        const int64_t col = slice.column(i);
        const int count = slice.count(i);
        auto v = load_chunk<T, kElems>(sums + col, count, a.next.x.aligned);
        Next::store(a.next, offset, col, count,
                    Next::norm(a.next, v, weights(a.next, col, count), s));
      });
    };
    a.next.x.dtype == DType::kFloat32 ? with_sum_type(float()) : with_sum_type(X());
  }
}

}  // namespace

int rms_norm_sandwich_forward(const RmsNormSandwich& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const RmsNormForward &norm = p.norm, &next = p.next;
  for (const DType type : {norm.x_dtype, weight_dtype(norm), next.x_dtype, weight_dtype(next)}) {
    if (is_double(type)) return forward_in_double(p, s);
  }
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  SandwichArgs a{{row_args(norm)}, {row_args(next)}};
  a.has_y = next.y != nullptr;
  a.scales = p.scale != 1;
  a.factor = static_cast<float>(p.scale);
  a.norm.y.dtype = norm.y_dtype;
  // All in chunks of x.
  a.next.input = a.norm.x;
  a.next.x = view_of(norm, next.x, next.x_dtype, next.x_rows);
  a.next.residual = view_of(norm, next.addends.residual, next.x_dtype, next.addends.residual_rows);
  a.next.y = view_of(norm, next.y, next.y_dtype, next.y_rows);
  a.next.weight.aligned =
      view_of(norm, next.weight, weight_dtype(next), a.next.weight.rows).aligned;
  a.norm.rstd = norm.rstd;
  a.next.rstd = next.rstd;
  a.norm.mean = a.next.mean = mean_of(norm.cols, norm.eps);
  const bool plain = norm.y_dtype == norm.x_dtype && is_plain(a.norm, a.next.x) &&
                     is_plain(a.next, a.next.residual, a.next.y);
  Plan plan = plan_sandwich(norm.rows, norm.cols, norm.x_dtype, here);
  if (!plain) plan = of_any_rows(plan, tuning_of(here.arch).limits[kSandwichAnyRows], here);
  lay_out(a.norm, plan);
  lay_out(a.next, plan);
  return with_type(norm.x_dtype, [&](auto x) {
    using X = decltype(x);
    void (*kernel)(SandwichArgs) = plan.keep == Keep::kNowhere  ? sandwich_any_rows<X>
                                   : plan.keep == Keep::kShared ? sandwich_shared_rows<X>
                                   : plan.vectors == 1          ? sandwich_rows<X, 1>
                                   : plan.vectors == 2          ? sandwich_rows<X, 2>
                                                                : sandwich_rows<X, 4>;
    return launch(kernel, plan, a, s);
  });
}

}  // namespace rmsnorm::cuda

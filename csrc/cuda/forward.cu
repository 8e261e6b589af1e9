// y = x * rstd * (weight + weight_offset), one reduction per row.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

// y has the type of x or, with kCast, of the weight as it is held. Where x is an fp32 sum, y may be
// of any.
template <typename N, bool kCast>
__device__ void store_norm(const NormArgs& a, int64_t index, int count, typename N::XChunk& x,
                           typename N::WChunk& w, const Scale& s) {
  using X = typename N::X;
  using Y = std::conditional_t<kCast, typename N::W, X>;
  constexpr int kElems = N::kElems;
  Chunk<Y, kElems> y;
  x.stay_packed();
  w.stay_packed();
#pragma unroll
  for (int i = 0; i < kElems / 2; ++i) {
    const float2 g = w.get(i);
    y.set(i, normalized<X, kCast>(x.get(i), {g.x + a.weight_offset, g.y + a.weight_offset}, s));
  }
  const auto store_as = [&](auto element) {
    using T = decltype(element);
    Chunk<T, kElems> narrow;
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) narrow.set(i, y.get(i));
    store_chunk(static_cast<T*>(a.y) + index, narrow, count, a.y_aligned);
  };
  if (N::kAdds && sizeof(X) == 4 && a.y_dtype == DType::kFloat16) return store_as(__half());
  if (N::kAdds && sizeof(X) == 4 && a.y_dtype == DType::kBFloat16) return store_as(__nv_bfloat16());
  store_chunk(static_cast<Y*>(a.y) + index, y, count, a.y_aligned);
}

// Rows held in registers, kVectors chunks per thread. A residual is as many bytes in flight again.
template <typename X, typename W, bool kCast, bool kAdd, int kVectors>
__global__ ROWS_BOUNDS(kForwardRows, kVectors, kAdd && sizeof(W) > sizeof(X)) void forward_rows(
    const __grid_constant__ NormArgs a) {
  sync_dependent_launch();
  using N = Norm<X, W, kAdd>;
  constexpr int kRows = kForwardVectors / kVectors;
  __shared__ Scratch scratch;
  const Cluster alone(1);
  RowGroup<kRows, kVectors, N::kElems> group{a.rows, static_cast<int>(a.cols), a.lanes, kRows == 1};
  typename N::WChunk w[kVectors];
  group.each_chunk(
      [&](int k, int col, int count) { w[k] = load_weight<W, N::kElems>(a.weight, col, count); });

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename N::XChunk x[kRows][kVectors] = {};
    Total<X> sum[kRows];
    const int live = group.live();
    load_rows<N>(a, group, live, x, sum);
    row_sum(sum, live, a.lanes, alone, scratch, turn);
    group.each_row([&](int r, int64_t row) {
      const Scale s = N::scale(a, sum[r], row, alone, group.lane);
      const int64_t y_offset = row_offset(a.y_rows, row);
      group.each_chunk([&](int k, int col, int count) {
        store_norm<N, kCast>(a, y_offset + col, count, x[r][k], w[k], s);
      });
    });
  }
}

template <typename N, bool kCast, bool kShared>
__device__ void long_rows(const NormArgs& a) {
  sync_dependent_launch();
  extern __shared__ uint4 kept[];
  __shared__ Scratch scratch;
  const Cluster cluster(a.cluster);
  const LongRows<N, kShared> slice(a, cluster, kept);
  using Index = typename LongRows<N, kShared>::Index;

  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows;
       row += gridDim.x / cluster.size, ++turn) {
    Total<typename N::X> sum[] = {slice.sum_of_squares(row)};
    typename N::WChunk w[kForwardVectors];
    Index first = slice.last_tile();
    slice.load_weights(first, w);
    row_sum(sum, 1, slice.lanes, cluster, scratch, turn);
    const Scale s = N::scale(a, sum[0], row, cluster, slice.lane);
    const int64_t x_offset = kShared ? 0 : row_offset(a.x_rows, row);
    for (; first >= 0; first -= slice.tile) {
      // Here, where it costs no register during the reduction.
      const int64_t y_offset = row_offset(a.y_rows, row);
      slice.each_chunk_again(x_offset, first, w, [&](Index i, auto& x, auto& weight) {
        store_norm<N, kCast>(a, y_offset + slice.column(i), slice.count(i), x, weight, s);
      });
      if (first > 0) slice.load_weights(first - slice.tile, w);
    }
  }
}

template <typename X, typename W, bool kCast, bool kAdd>
__global__ LAUNCH_BOUNDS(kForwardSharedRows,
                         kAdd) void forward_shared_rows(const __grid_constant__ NormArgs a) {
  long_rows<Norm<X, W, kAdd>, kCast, true>(a);
}

template <typename X, typename W, bool kCast, bool kAdd>
__global__ LAUNCH_BOUNDS(kForwardLongRows,
                         kAdd) void forward_long_rows(const __grid_constant__ NormArgs a) {
  long_rows<Norm<X, W, kAdd>, kCast, false>(a);
}

template <typename X, typename W, bool kCast, bool kAdd>
int launch_forward(const NormArgs& a, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(NormArgs) = plan.keep == Keep::kNowhere  ? forward_long_rows<X, W, kCast, kAdd>
                             : plan.keep == Keep::kShared ? forward_shared_rows<X, W, kCast, kAdd>
                             : plan.vectors == 1          ? forward_rows<X, W, kCast, kAdd, 1>
                             : plan.vectors == 2          ? forward_rows<X, W, kCast, kAdd, 2>
                                                          : forward_rows<X, W, kCast, kAdd, 4>;
  return launch(kernel, plan, a, stream);
}

template <typename X, typename W>
int launch_forward(const RmsNormForward& p, const NormArgs& a, const Plan& plan,
                   cudaStream_t stream) {
  if (a.input.data != nullptr) {
    return p.cast_before_weight ? launch_forward<X, W, true, true>(a, plan, stream)
                                : launch_forward<X, W, false, true>(a, plan, stream);
  }
  return p.cast_before_weight ? launch_forward<X, W, true, false>(a, plan, stream)
                              : launch_forward<X, W, false, false>(a, plan, stream);
}

}  // namespace

int rms_norm_forward(const RmsNormForward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const DType w_dtype = p.weight != nullptr ? p.w_dtype : p.x_dtype;
  const Addends& addends = p.addends;
  const auto is_double = [](DType type) { return type == DType::kFloat64; };
  const bool in_double = is_double(p.x_dtype) || is_double(w_dtype);
  const bool in_kernel = p.x_dtype == DType::kFloat32 ? !is_double(addends.input_dtype)
                                                      : addends.input_dtype == p.x_dtype;
  const bool adds = addends.input != nullptr && !in_double && in_kernel;
  if (addends.input != nullptr && !adds) {  // rare pairs of dtypes: two kernels
    const int error = add_any(p, s);
    if (error != 0) return error;
  }
  if (in_double) return forward_in_double(p, s);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();

  const Plan plan = plan_forward(p.rows, p.cols, p.x_dtype, here, p.quant.data != nullptr);
  const int elems = vector_elems(p.x_dtype);
  NormArgs a{};
  a.x = {p.x, p.x_dtype, rows_aligned(p.x, p.x_rows, p.rows, p.x_dtype, elems)};
  a.weight = {p.weight, w_dtype, row_aligned(p.weight, w_dtype, elems)};
  if (adds) {
    const auto aligned = [&](const void* data, const Rows& rows, DType type) {
      return rows_aligned(data, rows, p.rows, type, elems);
    };
    a.input = {addends.input, addends.input_dtype,
               aligned(addends.input, addends.input_rows, addends.input_dtype)};
    a.residual = {addends.residual, p.x_dtype,
                  aligned(addends.residual, addends.residual_rows, p.x_dtype)};
    a.input_rows = addends.input_rows;
    a.residual_rows = addends.residual_rows;
  }
  a.y_dtype = p.y_dtype;
  a.y = p.y;
  a.y_aligned = rows_aligned(p.y, p.y_rows, p.rows, p.y_dtype, elems);
  a.rstd = p.rstd;
  a.x_rows = p.x_rows;
  a.y_rows = p.y_rows;
  a.rows = p.rows;
  a.cols = p.cols;
  a.eps = p.eps;
  a.mean = mean_of(p.cols, p.eps);
  a.weight_offset = p.weight != nullptr ? static_cast<float>(p.weight_offset) : 0.0f;
  a.lanes = plan.lanes;
  a.cluster = plan.cluster;
  a.slice = plan.slice;
  if (p.quant.data != nullptr) return launch_quant(p, a, plan, s);
  const bool same = held_dtype(p.x_dtype, w_dtype) == p.x_dtype;
  switch (p.x_dtype) {
    case DType::kFloat32:
      return launch_forward<float, float>(p, a, plan, s);
    case DType::kFloat16:
      return same ? launch_forward<__half, __half>(p, a, plan, s)
                  : launch_forward<__half, float>(p, a, plan, s);
    default:
      return same ? launch_forward<__nv_bfloat16, __nv_bfloat16>(p, a, plan, s)
                  : launch_forward<__nv_bfloat16, float>(p, a, plan, s);
  }
}

}  // namespace rmsnorm::cuda

// y = x * rstd * (weight + weight_offset), one reduction per row.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

// y has the type of x or, with kCast, of the weight as it is held. Where x is an fp32 sum, y may be
// of any.
template <typename NType, bool kCast>
struct StoreNorm {
  using N = NType;
  using Args = NormArgs;
  static constexpr bool kFindsLargest = false;
  const Args& a;
  const int64_t row;
  const Scale& s;
  const Largest& largest;  // not looked at
  const int64_t y_offset = a.y.offset(row);

  __device__ void store(int64_t col, int count, typename N::XChunk& x,
                        typename N::WChunk& w) const {
    using X = typename N::X;
    using Y = std::conditional_t<kCast, typename N::W, X>;
    Chunk<Y, N::kElems> y;
    x.stay_packed();
    w.stay_packed();
    unrolled<N::kElems / 2>(
        [&](int i) { y.set(i, normalized<X, kCast>(x.get(i), w.get(i) + a.weight_offset, s)); });
    const int64_t index = y_offset + col;
    if constexpr (N::kAdds && sizeof(X) == 4) {
      with_type(a.y.dtype, [&](auto type) { store_chunk<decltype(type)>(a.y, index, y, count); });
    } else {
      store_chunk<Y>(a.y, index, y, count);
    }
  }
};

template <typename X, typename W, bool kCast, bool kAdd, int kVectors>
SHORT_ROW_KERNEL(kForwardRows, kVectors, kAdd && sizeof(W) > sizeof(X))
forward_rows(const __grid_constant__ NormArgs a) {
  norm_rows<StoreNorm<Norm<X, W, kAdd>, kCast>, kVectors>(a);
}

template <typename X, typename W, bool kCast, bool kAdd>
ROW_KERNEL(kForwardSharedRows, kAdd)
forward_shared_rows(const __grid_constant__ NormArgs a) {
  norm_long_rows<StoreNorm<Norm<X, W, kAdd>, kCast>, true>(a);
}

template <typename X, typename W, bool kCast, bool kAdd>
ROW_KERNEL(kForwardLongRows, kAdd)
forward_long_rows(const __grid_constant__ NormArgs a) {
  norm_long_rows<StoreNorm<Norm<X, W, kAdd>, kCast>, false>(a);
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

}  // namespace

int rms_norm_forward(const RmsNormForward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Addends& addends = p.addends;
  const bool in_double = is_double(p.x_dtype) || is_double(weight_dtype(p));
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
  NormArgs a{row_args(p, plan)};
  a.y = view_of(p, p.y, p.y_dtype, p.y_rows);
  if (adds) {
    a.input = view_of(p, addends.input, addends.input_dtype, addends.input_rows);
    a.residual = view_of(p, addends.residual, p.x_dtype, addends.residual_rows);
  }
  a.rstd = p.rstd;
  a.mean = mean_of(p.cols, p.eps);
  if (p.quant.data != nullptr) return launch_quant(p, a, plan, s);
  return with_type(p.x_dtype, [&](auto x) {
    return with_held_type(x, p.x_dtype, a.weight.dtype, [&](auto w) {
      return with_flag(p.cast_before_weight, [&](auto cast) {
        return with_flag(adds, [&](auto add) {
          return launch_forward<decltype(x), decltype(w), decltype(cast)::value,
                                decltype(add)::value>(a, plan, s);
        });
      });
    });
  });
}

}  // namespace rmsnorm::cuda

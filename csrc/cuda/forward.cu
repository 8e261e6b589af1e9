// y = x * rstd * (weight + weight_offset), one reduction per row.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

template <typename X, Form kForm, bool kAdd>
struct StoreNorm {
  using N = Norm<X, kForm, kAdd>;
  using Args = NormArgs;
  static constexpr bool kFindsLargest = false;

  __device__ void prepare(const Args&) {}

  struct Place {
    const Args& a;
    const int64_t offset;
    __device__ Place(const Args& a, int64_t row, int64_t begin)
        : a(a), offset(begin + a.y.offset<N::kPlain>(row)) {}

    template <typename Index>
    __device__ void store(Index col, int count, const typename N::YChunk& y) const {
      N::store(a, offset, col, count, y);
    }
  };
};

template <typename X, Form kForm, bool kAdd, int kVectors>
SHORT_ROW_KERNEL(kForwardRows, kVectors, (kAdd || kForm == Form::kAny))
forward_rows(const __grid_constant__ NormArgs a) {
  norm_rows<StoreNorm<X, kForm, kAdd>, kVectors>(a);
}

template <typename X, Form kForm, bool kAdd>
ROW_KERNEL(kForwardSharedRows, (kAdd || kForm == Form::kAny))
forward_shared_rows(const __grid_constant__ NormArgs a) {
  norm_long_rows<StoreNorm<X, kForm, kAdd>, true>(a);
}

template <typename X, bool kAdd>
ROW_KERNEL(kForwardLongRows, kAdd)
forward_long_rows(const __grid_constant__ NormArgs a) {
  norm_long_rows<StoreNorm<X, Form::kAny, kAdd>, false>(a);
}

template <typename X, Form kForm, bool kAdd>
int launch_forward(const NormArgs& a, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(NormArgs) = plan.keep == Keep::kNowhere  ? forward_long_rows<X, kAdd>
                             : plan.keep == Keep::kShared ? forward_shared_rows<X, kForm, kAdd>
                             : plan.vectors == 1          ? forward_rows<X, kForm, kAdd, 1>
                             : plan.vectors == 2          ? forward_rows<X, kForm, kAdd, 2>
                                                          : forward_rows<X, kForm, kAdd, 4>;
  return launch(kernel, plan, a, stream);
}

}  // namespace

int rms_norm_forward(const RmsNormForward& asked, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const DType sum_dtype = asked.x_dtype;
  const bool unrounded = is_unrounded(asked);
  RmsNormForward p = asked;
  const Addends& addends = p.addends;
  const bool in_double = is_double(p.x_dtype) || is_double(weight_dtype(p));
  if (unrounded && (in_double || is_double(addends.input_dtype))) return forward_in_double(p, s);
  if (unrounded) p.x_dtype = DType::kFloat32;
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

  NormArgs a{row_args(p)};
  a.y = view_of(p, p.y, p.y_dtype, p.y_rows);
  if (adds) {
    a.x = view_of(p, p.x, sum_dtype, p.x_rows);
    a.input = view_of(p, addends.input, addends.input_dtype, addends.input_rows);
    a.residual = view_of(p, addends.residual, sum_dtype, addends.residual_rows);
  }
  a.rstd = p.rstd;
  a.mean = mean_of(p.cols, p.eps);
  const bool plain = !unrounded && is_plain(a, a.y, a.input, a.residual);
  if (p.quant.data != nullptr) return launch_quant(p, a, plain, here, s);
  const Plan plan = plan_forward(p.rows, p.cols, p.x_dtype, here, adds || !plain);
  lay_out(a, plan);
  return with_type(p.x_dtype, [&](auto x) {
    return with_form(plain, a.cast_before_weight, [&](auto form) {
      return with_flag(adds, [&](auto add) {
        return launch_forward<decltype(x), decltype(form)::value, decltype(add)::value>(a, plan, s);
      });
    });
  });
}

}  // namespace rmsnorm::cuda

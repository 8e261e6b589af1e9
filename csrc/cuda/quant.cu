// The norm in 8 bits, saturated: see quant.cuh.
#include "norm.cuh"
#include "quant.cuh"

namespace rmsnorm::cuda {
namespace {

struct QuantArgs : NormArgs, QuantEnd {};

template <typename X, Form kForm, bool kAdd>
using StoreCodes = StoreQuant<Norm<X, kForm, kAdd>, QuantArgs>;

template <typename X, Form kForm, bool kAdd, int kVectors>
SHORT_ROW_KERNEL(kQuantRows, kVectors, kAdd)
quant_rows(const __grid_constant__ QuantArgs a) {
  norm_rows<StoreCodes<X, kForm, kAdd>, kVectors>(a);
}

template <typename X, Form kForm, bool kAdd>
ROW_KERNEL(kQuantSharedRows, (kAdd || kForm == Form::kAny))
quant_shared_rows(const __grid_constant__ QuantArgs a) {
  norm_long_rows<StoreCodes<X, kForm, kAdd>, true>(a);
}

template <typename X, bool kAdd>
ROW_KERNEL(kQuantLongRows, kAdd)
quant_long_rows(const __grid_constant__ QuantArgs a) {
  norm_long_rows<StoreCodes<X, Form::kAny, kAdd>, false>(a);
}

template <typename X, Form kForm, bool kAdd>
int launch_rows(const QuantArgs& a, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(QuantArgs) = plan.keep == Keep::kNowhere  ? quant_long_rows<X, kAdd>
                              : plan.keep == Keep::kShared ? quant_shared_rows<X, kForm, kAdd>
                              : plan.vectors == 1          ? quant_rows<X, kForm, kAdd, 1>
                              : plan.vectors == 2          ? quant_rows<X, kForm, kAdd, 2>
                                                           : quant_rows<X, kForm, kAdd, 4>;
  return launch(kernel, plan, a, stream);
}

}  // namespace

int launch_quant(const RmsNormForward& p, const NormArgs& args, bool plain, const Device& here,
                 cudaStream_t stream) {
  QuantArgs a{args, quant_end(p)};
  plain = plain && a.codes_aligned && p.y_dtype == p.x_dtype;
  const bool adds = a.input.data != nullptr;
  const Plan plan = plan_forward(p.rows, p.cols, p.x_dtype, here, adds || !plain, true);
  lay_out(a, plan);
  return with_type(p.x_dtype, [&](auto x) {
    return with_form(plain, a.cast_before_weight, [&](auto form) {
      return with_flag(adds, [&](auto add) {
        return launch_rows<decltype(x), decltype(form)::value, decltype(add)::value>(a, plan,
                                                                                     stream);
      });
    });
  });
}

}  // namespace rmsnorm::cuda

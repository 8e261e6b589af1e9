// y = x * rstd * (weight + weight_offset), one reduction per row.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

// y has the type of x or, where the kernel is not plain, any.
template <typename XType, Form kForm, bool kAdd>
struct StoreNorm {
  using N = Norm<XType, kForm, kAdd>;
  using Args = NormArgs;
  using YChunk = Chunk<std::conditional_t<N::kPlain, XType, float>, N::kElems>;
  static constexpr bool kFindsLargest = false;

  __device__ void prepare(const Args&) {}

  static __device__ YChunk norm(const Args& a, typename N::XChunk& x, const typename N::WChunk& w,
                                const Scale& s) {
    const bool cast = kForm == Form::kPlainCast || (!N::kPlain && a.cast_before_weight);
    YChunk y;
    x.stay_packed();
    unrolled<N::kElems / 2>([&](int i) {
      y.set(i, cast ? normalized<XType, true>(x.get(i), w.get(i), s)
                    : normalized<XType, false>(x.get(i), w.get(i), s));
    });
    return y;
  }

  struct Place {
    const Args& a;
    const int64_t y_offset;
    __device__ Place(const Args& a, int64_t row, int64_t begin)
        : a(a), y_offset(begin + a.y.offset<N::kPlain>(row)) {}

    template <typename Index>
    __device__ void store(Index col, int count, const YChunk& y) const {
      if constexpr (N::kPlain) {
        store_chunk<true, XType>(a.y, y_offset, col, y, count);
      } else {
        with_type(a.y.dtype, [&](auto type) {
          store_chunk<false, decltype(type)>(a.y, y_offset, col, y, count);
        });
      }
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

  NormArgs a{row_args(p)};
  a.y = view_of(p, p.y, p.y_dtype, p.y_rows);
  if (adds) {
    a.input = view_of(p, addends.input, addends.input_dtype, addends.input_rows);
    a.residual = view_of(p, addends.residual, p.x_dtype, addends.residual_rows);
  }
  a.rstd = p.rstd;
  a.mean = mean_of(p.cols, p.eps);
  const bool plain = is_plain(a, a.y, a.input, a.residual);
  const bool quant = p.quant.data != nullptr;
  const Plan plan = plan_forward(p.rows, p.cols, p.x_dtype, here, adds || !plain, quant);
  lay_out(a, plan);
  if (quant) return launch_quant(p, a, plan, plain, s);
  return with_type(p.x_dtype, [&](auto x) {
    return with_form(plain, a.cast_before_weight, [&](auto form) {
      return with_flag(adds, [&](auto add) {
        return launch_forward<decltype(x), decltype(form)::value, decltype(add)::value>(a, plan, s);
      });
    });
  });
}

}  // namespace rmsnorm::cuda

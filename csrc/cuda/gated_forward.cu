// y = norm(x) * act(gate) or norm(x * act(gate)), of groups of columns: see gated.cuh.
#include "gated_norm.cuh"

namespace rmsnorm::cuda {
namespace {

template <typename X, Order kOrder>
struct StoreGated {
  using N = GatedNorm<X, kOrder>;
  using Args = GatedNormArgs;
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

template <typename X, Order kOrder, int kVectors>
GATED_ROW_KERNEL(kGatedRows, kVectors)
gated_rows(const __grid_constant__ GatedNormArgs a) {
  gated_norm_rows<StoreGated<X, kOrder>, kVectors>(a);
}

template <typename X, Order kOrder>
ROW_KERNEL(kGatedSharedRows, false)
gated_shared_rows(const __grid_constant__ GatedNormArgs a) {
  gated_norm_shared_rows<StoreGated<X, kOrder>>(a);
}

template <typename X>
ROW_KERNEL(kGatedAnyRows, false)
gated_any_rows(const __grid_constant__ GatedNormArgs a) {
  gated_norm_any_rows<StoreGated<X, Order::kAny>>(a);
}

}  // namespace

int rms_norm_gated_forward(const RmsNormGated& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_double(p)) return forward_in_double(p, s);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  const RmsNormForward& norm = p.norm;
  const GatedNormArgs args = gated_norm_args(p);
  const bool plain = is_plain(args, args.gate, args.y);
  if (norm.quant.data != nullptr) return launch_gated_quant(p, args, plain, here, s);
  GatedNormArgs a = args;
  GatedPlan plan = plan_gated_forward(norm.rows, p.groups, a.cols, norm.x_dtype, here);
  lay_out(a, plan);
  return with_type(norm.x_dtype, [&](auto x) {
    using X = decltype(x);
    if (plain && plan.keep != Keep::kNowhere) {
      return with_flag(a.before_norm, [&](auto before) {
        constexpr Order kOrder = decltype(before)::value ? Order::kBefore : Order::kBehind;
        void (*kernel)(GatedNormArgs) = plan.keep == Keep::kShared ? gated_shared_rows<X, kOrder>
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

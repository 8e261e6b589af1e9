// Norms with a gate, or of groups of columns, in 8 bits: see gated.cuh and quant.cuh.
#include "gated_norm.cuh"
#include "quant.cuh"

namespace rmsnorm::cuda {
namespace {

struct GatedQuantArgs : GatedNormArgs, QuantEnd {};

template <typename X, Order kOrder>
using StoreGatedCodes = StoreQuant<GatedNorm<X, kOrder>, GatedQuantArgs>;

// Of 16 bits. Plain rows of fp32, which are rare, are among all others.
template <typename X, Order kOrder, int kVectors>
GATED_ROW_KERNEL(kGatedQuantRows, kVectors)
gated_quant_rows(const __grid_constant__ GatedQuantArgs a) {
  gated_norm_rows<StoreGatedCodes<X, kOrder>, kVectors>(a);
}

template <typename X, Order kOrder>
ROW_KERNEL(kGatedQuantSharedRows, false)
gated_quant_shared_rows(const __grid_constant__ GatedQuantArgs a) {
  gated_norm_shared_rows<StoreGatedCodes<X, kOrder>>(a);
}

template <typename X>
ROW_KERNEL(kGatedQuantAnyRows, false)
gated_quant_any_rows(const __grid_constant__ GatedQuantArgs a) {
  gated_norm_any_rows<StoreGatedCodes<X, Order::kAny>>(a);
}

// ---------------------------------------------------------------- scales of several groups

struct QuantizeArgs : QuantEnd {
  View norm, y;  // y is not there: StoreQuant has no norm to store
  int64_t rows, cols;
};

// Rows of T that are there already, as StoreQuant wants to know them.
template <typename T>
struct GivenNorm {
  using X = T;
  static constexpr bool kPlain = false;
  static constexpr int kElems = 16 / sizeof(T);
  using YChunk = Chunk<T, kElems>;
  using LargestY = Largest<T>;

  template <typename Index>
  static __device__ void store(const QuantizeArgs&, int64_t, Index, int, const YChunk&) {}
};

// The norm of all groups of a row, read again, if need be once more.
template <typename T>
ROW_KERNEL(kQuantizeRows, false)
quantize_rows(const __grid_constant__ QuantizeArgs a) {
  sync_dependent_launch();
  using N = GivenNorm<T>;
  using E = StoreQuant<N, QuantizeArgs>;
  const Cluster alone(1);
  const Slice<int64_t, 1, N::kElems> slice{0, a.cols};
  E epilogue;
  epilogue.prepare(a);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, ++turn) {
    const int64_t offset = a.norm.offset<false>(row);
    const auto load = [&](int64_t i) {
      return load_chunk<false, T, N::kElems>(a.norm, offset, slice.column(i), slice.count(i));
    };
    typename N::LargestY largest;
    if (a.per_token) {
      slice.each_index([&](int64_t i) { largest.take(load(i)); });
      row_sum(largest, alone, turn);
    }
    const typename E::Place place(epilogue, a, row, 0, largest, slice.lane == 0);
    slice.each_index([&](int64_t i) { place.store(slice.column(i), slice.count(i), load(i)); });
  }
}

int launch_quantize(RmsNormForward norm, const Device& here, cudaStream_t stream) {
  norm.x_dtype = norm.y_dtype;  // which its chunks are of
  QuantizeArgs a{quant_end(norm), view_of(norm, norm.y, norm.y_dtype, norm.y_rows), View{}};
  a.rows = norm.rows;
  a.cols = norm.cols;
  const Plan plan = plan_quantize(norm.rows, norm.cols, norm.y_dtype, here);
  return with_type(norm.y_dtype,
                   [&](auto y) { return launch(quantize_rows<decltype(y)>, plan, a, stream); });
}

}  // namespace

int launch_gated_quant(const RmsNormGated& p, const GatedNormArgs& args, bool plain,
                       const Device& here, cudaStream_t stream) {
  const RmsNormForward& norm = p.norm;
  if (p.scales_span_groups()) {  // a block of threads has one group: two kernels
    RmsNormGated alone = p;
    alone.norm.quant = {};
    const int error = rms_norm_gated_forward(alone, stream);
    return error != 0 ? error : launch_quantize(norm, here, stream);
  }
  GatedQuantArgs a{args, quant_end(norm)};
  a.codes_aligned = a.codes_aligned && has_whole_groups(p);
  plain = plain && a.codes_aligned && norm.y_dtype == norm.x_dtype &&
          norm.x_dtype != DType::kFloat32 && norm.cols <= std::numeric_limits<int32_t>::max();
  GatedPlan plan = plan_gated_forward(norm.rows, p.groups, a.cols, norm.x_dtype, here, true);
  lay_out(a, plan);
  return with_type(norm.x_dtype, [&](auto x) {
    using X = decltype(x);
    if constexpr (sizeof(X) == 2) {
      if (plain && plan.keep != Keep::kNowhere) {
        return with_flag(a.before_norm, [&](auto before) {
          constexpr Order kOrder = decltype(before)::value ? Order::kBefore : Order::kBehind;
          void (*kernel)(GatedQuantArgs) = plan.keep == Keep::kShared
                                               ? gated_quant_shared_rows<X, kOrder>
                                           : plan.vectors == 1 ? gated_quant_rows<X, kOrder, 1>
                                                               : gated_quant_rows<X, kOrder, 2>;
          return launch_groups(kernel, plan, p.groups, a, stream);
        });
      }
    }
    plan = of_any_rows(plan, tuning_of(here.arch).limits[kGatedQuantAnyRows], here);
    return launch_groups(gated_quant_any_rows<X>, plan, p.groups, a, stream);
  });
}

}  // namespace rmsnorm::cuda

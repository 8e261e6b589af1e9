// Gradients of the ops, in C++ so that they cost little and work without Python. Each has three ways:
//   1. no gradient is recorded: straight to the kernel, or to what a functorch transform has below (vmap: vmap.py);
//   2. one is by a functorch transform, or there is a forward-mode tangent: the formula in ATen ops, which torch
//      differentiates and batches itself, in any nesting;
//   3. else an autograd::Function over rms_norm_forward and rms_norm_backward. The backward op has a
//      gradient of its own (the formula again), so that second derivatives are right.
#include <ATen/FuncTorchTLS.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <tuple>

#include "checks.h"
#include "signatures.h"

namespace rmsnorm {
namespace {

using at::Tensor;
using c10::DispatchKeySet;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

auto& rms_norm_op() {
  static const auto op = find<Signature>("rmsnorm_cuda::rms_norm");
  return op;
}
auto& rms_norm_out_op() {
  static const auto op = find<OutSignature>("rmsnorm_cuda::rms_norm", "out");
  return op;
}
auto& rms_norm_forward_op() {
  static const auto op = find<ForwardSignature>("rmsnorm_cuda::rms_norm_forward");
  return op;
}
auto& rms_norm_backward_op() {
  static const auto op = find<BackwardSignature>("rmsnorm_cuda::rms_norm_backward");
  return op;
}

auto& fused_add_rms_norm_op() {
  static const auto op = find<FusedSignature>("rmsnorm_cuda::fused_add_rms_norm");
  return op;
}
auto& fused_add_rms_norm_forward_op() {
  static const auto op = find<FusedForwardSignature>("rmsnorm_cuda::fused_add_rms_norm_forward");
  return op;
}
auto& fused_add_rms_norm__op() {
  static const auto op = find<FusedInPlaceSignature>("rmsnorm_cuda::fused_add_rms_norm_");
  return op;
}

auto& fused_add_rms_norm_out_op() {
  static const auto op = find<FusedOutSignature>("rmsnorm_cuda::fused_add_rms_norm", "out");
  return op;
}
auto& rms_norm_quant_op() {
  static const auto op = find<QuantSignature>("rmsnorm_cuda::rms_norm_quant");
  return op;
}
auto& rms_norm_quant_out_op() {
  static const auto op = find<QuantOutSignature>("rmsnorm_cuda::rms_norm_quant", "out");
  return op;
}
auto& fused_add_rms_norm_quant_op() {
  static const auto op = find<FusedQuantSignature>("rmsnorm_cuda::fused_add_rms_norm_quant");
  return op;
}
auto& fused_add_rms_norm_quant_out_op() {
  static const auto op = find<FusedQuantOutSignature>("rmsnorm_cuda::fused_add_rms_norm_quant", "out");
  return op;
}

// For rows whose squares leave the range of the type: about what brings their largest element to 1. All others keep 1, and
// with it their bits. A constant to every derivative. `most` keeps eps * scale^2 finite.
Tensor row_scale(const Tensor& x, at::IntArrayRef dims, double eps) {
  const bool fp64 = x.scalar_type() == at::kDouble;
  const double edge = fp64 ? 1e150 : 1e15, range = fp64 ? 1e300 : 1e30;
  const double most = std::min(range, 0.5 * std::sqrt((fp64 ? 1e307 : 1e38) / std::max(eps, 1e-320)));
  const Tensor largest = at::amax(x.detach().abs(), dims, /*keepdim=*/true);
  const Tensor inside = largest.gt(1 / edge).logical_and(largest.lt(edge)).logical_or(at::isfinite(largest).logical_not());
  return at::where(inside, 1.0, at::reciprocal(largest).clamp(1 / range, most)).to(x.scalar_type());
}

// The formula, in the type that the kernels compute in. For transforms and second derivatives it is rescaled: as the kernels,
// it then does rows whose squares leave the range of that type. Compilers that are to fuse it have it without.
template <bool rescaled>
struct Formula {
  at::ScalarType compute;
  std::vector<int64_t> normalized_dims;  // from the end: -1, -2, ...
  std::vector<int64_t> lead_dims;
  Tensor x, inverse_rms, rstd;  // x is scaled, as is inverse_rms, which is that of this x; rstd is that of the input
  Tensor xhat, weight;          // xhat: what the weight multiplies; weight undefined if there is none

  Formula(const char* op, const Tensor& input, SymIntArrayRef normalized_shape, const OptionalTensor& w,
          std::optional<double> eps, double weight_offset, bool cast_before_weight)
      : compute(input.scalar_type() == at::kDouble || (w && w->scalar_type() == at::kDouble) ? at::kDouble : at::kFloat),
        normalized_dims(normalized_shape.size()) {
    check_arguments(op, input, input.sym_sizes(), normalized_shape, w, w ? w->sym_sizes() : SymIntArrayRef(), eps,
                    weight_offset);
    lead_dims.resize(input.dim() - normalized_dims.size());
    for (size_t i = 0; i < normalized_dims.size(); ++i) normalized_dims[i] = -1 - static_cast<int64_t>(i);
    std::iota(lead_dims.begin(), lead_dims.end(), 0);
    x = input.to(compute);
    const double epsilon = eps_or_default(eps, input);
    const bool any = std::none_of(normalized_shape.begin(), normalized_shape.end(), [](const auto& size) { return size == 0; });
    if (rescaled && any) {
      const Tensor scale = row_scale(x, normalized_dims, epsilon);
      x = x * scale;
      inverse_rms = at::rsqrt(at::mean(x * x, normalized_dims, /*keepdim=*/true) + at::square(scale * std::sqrt(epsilon)));
      rstd = inverse_rms * scale;
    } else {
      rstd = inverse_rms = at::rsqrt(at::mean(x * x, normalized_dims, /*keepdim=*/true) + epsilon);
    }
    xhat = x * inverse_rms;
    if (cast_before_weight) xhat = xhat.to(input.scalar_type()).to(compute);
    if (w) weight = w->to(compute) + weight_offset;
  }

  Tensor output(const Tensor& input, const OptionalTensor& w, bool cast_before_weight) const {
    return (weight.defined() ? xhat * weight : xhat).to(output_type(input, w, cast_before_weight));
  }

  Tensor saved_rstd(const Tensor& input) const {
    Tensor flat = rstd;
    for (size_t i = 0; i < normalized_dims.size(); ++i) flat = flat.squeeze(-1);
    return flat.to(rstd_type(input));
  }

  std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& w,
                                      std::array<bool, 2> output_mask, const OptionalTensor& grad_residual) const {
    TORCH_CHECK(grad_output.sym_sizes() == input.sym_sizes(), "rms_norm_backward: expected grad_output of shape ",
                input.sym_sizes(), ", but got ", grad_output.sym_sizes());
    const Tensor dy = grad_output.to(compute);
    Tensor dx, dweight;
    if (output_mask[0]) {
      const Tensor g = weight.defined() ? dy * weight : dy;
      const Tensor unrounded = x * inverse_rms;
      dx = rstd * (g - unrounded * at::mean(g * unrounded, normalized_dims, true));
      if (grad_residual) dx = dx + grad_residual->to(compute);
      dx = dx.to(input.scalar_type());
    }
    if (output_mask[1] && w) {
      const Tensor product = dy * xhat;
      dweight = (lead_dims.empty() ? product : at::sum(product, lead_dims)).to(w->scalar_type());
    }
    return {dx, dweight};
  }
};

// What the ops compute, as ops of their own (rms_norm_formula, ...), for compilers that are to fuse it with its neighbours.
template <bool rescaled>
Tensor rms_norm_formula(const Tensor& input, SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                        std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  return Formula<rescaled>("rms_norm", input, normalized_shape, weight, eps, weight_offset, cast_before_weight)
      .output(input, weight, cast_before_weight);
}

template <bool rescaled>
std::tuple<Tensor, Tensor> rms_norm_forward_formula(const Tensor& input, SymIntArrayRef normalized_shape,
                                                    const OptionalTensor& weight, std::optional<double> eps,
                                                    double weight_offset, bool cast_before_weight) {
  const Formula<rescaled> formula("rms_norm", input, normalized_shape, weight, eps, weight_offset, cast_before_weight);
  return {formula.output(input, weight, cast_before_weight), formula.saved_rstd(input).detach()};
}

template <bool rescaled>
std::tuple<Tensor, Tensor> rms_norm_backward_formula(const Tensor& grad_output, const Tensor& input,
                                                     SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                                     const Tensor& /*rstd*/, std::optional<double> eps,
                                                     std::array<bool, 2> output_mask, const OptionalTensor& grad_residual,
                                                     double weight_offset, bool cast_before_weight) {
  return Formula<rescaled>("rms_norm_backward", input, normalized_shape, weight, eps, weight_offset, cast_before_weight)
      .backward(grad_output, input, weight, output_mask, grad_residual);
}

// Only the narrower dtype of the output differs from the norm of the sum.
template <bool rescaled>
std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_forward_formula(const Tensor& input, const Tensor& residual,
                                                                      const OptionalTensor& weight, std::optional<double> eps,
                                                                      double weight_offset, bool cast_before_weight) {
  constexpr const char* op = "fused_add_rms_norm";
  check_residual(op, input, input.sym_sizes(), residual, residual.sym_sizes());
  const at::ScalarType compute = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor sum = (input.to(compute) + residual.to(compute)).to(residual.scalar_type());
  const Formula<rescaled> formula(op, sum, sum.sym_sizes().slice(sum.dim() - 1), weight, eps, weight_offset, cast_before_weight);
  return {formula.output(sum, weight, cast_before_weight).to(output_type(input, weight, cast_before_weight)), sum,
          formula.saved_rstd(sum).detach()};
}

template <bool rescaled>
std::tuple<Tensor, Tensor> fused_add_rms_norm_formula(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                                      std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  const auto [output, sum, rstd] =
      fused_add_rms_norm_forward_formula<rescaled>(input, residual, weight, eps, weight_offset, cast_before_weight);
  return {output, sum};
}

bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }
bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }

template <class... Tensors>
bool records_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// functorch has no C++ interface to ask; it throws where an autograd::Function would be wrong.
bool in_functorch_transform() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return false;
  try {
    functorch->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

// Which of the three ways a call takes.
enum class Way { kKernel, kFormula, kFunction };
template <class... Tensors>
Way way(const Tensors&... tensors) {
  if ((has_tangent(tensors) || ...)) return Way::kFormula;
  if (!records_grad(tensors...)) return Way::kKernel;
  return in_functorch_transform() ? Way::kFormula : Way::kFunction;
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static constexpr bool is_traceable = true;  // nothing but tensors, numbers and ops: compiled autograd may trace it

  // rstd goes out beside the differentiable result, by pointer, so that it has no gradient.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        SymIntArrayRef normalized_shape, std::optional<double> eps, double weight_offset,
                        bool cast_before_weight, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, row_rstd] =
        rms_norm_forward_op().call(input, normalized_shape, weight, eps, weight_offset, cast_before_weight);
    if (rstd) *rstd = row_rstd;
    ctx->save_for_backward({input, weight.value_or(Tensor()), row_rstd});
    // An entry of saved_data costs an allocation or two: only what differs from the usual is kept.
    if (normalized_shape.size() != 1) ctx->saved_data["normalized"] = static_cast<int64_t>(normalized_shape.size());
    if (eps) ctx->saved_data["eps"] = *eps;
    if (weight_offset != 0) ctx->saved_data["weight_offset"] = weight_offset;
    if (cast_before_weight) ctx->saved_data["cast_before_weight"] = true;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& input = saved[0];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const auto kept = [ctx](const char* key) -> std::optional<c10::IValue> {
      const auto found = ctx->saved_data.find(key);
      return found == ctx->saved_data.end() ? std::nullopt : std::optional<c10::IValue>(found->second);
    };
    const auto normalized = kept("normalized"), eps = kept("eps"), weight_offset = kept("weight_offset");
    const int64_t lead = input.dim() - (normalized ? normalized->toInt() : 1);
    const std::array<bool, 2> mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1)};
    auto [dx, dweight] = rms_norm_backward_op().call(
        grads[0], input, input.sym_sizes().slice(lead), weight, saved[2],
        eps ? std::optional<double>(eps->toDouble()) : std::nullopt, mask,
        std::nullopt, weight_offset ? weight_offset->toDouble() : 0.0, kept("cast_before_weight").has_value());
    return {dx, dweight, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor rms_norm(DispatchKeySet keys, const Tensor& input, SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  switch (way(input, weight)) {
    case Way::kKernel:
      return rms_norm_op().redispatch(keys & c10::after_autograd_keyset, input, normalized_shape, weight, eps, weight_offset,
                                      cast_before_weight);
    case Way::kFormula:
      return rms_norm_formula<true>(input, normalized_shape, weight, eps, weight_offset, cast_before_weight);
    default:
      return RmsNorm::apply(input, weight, normalized_shape, eps, weight_offset, cast_before_weight, nullptr);
  }
}

std::tuple<Tensor, Tensor> rms_norm_forward(DispatchKeySet keys, const Tensor& input, SymIntArrayRef normalized_shape,
                                            const OptionalTensor& weight, std::optional<double> eps,
                                            double weight_offset, bool cast_before_weight) {
  const Way taken = way(input, weight);
  if (taken == Way::kKernel) {
    return rms_norm_forward_op().redispatch(keys & c10::after_autograd_keyset, input, normalized_shape, weight, eps,
                                            weight_offset, cast_before_weight);
  }
  if (taken == Way::kFormula) {
    return rms_norm_forward_formula<true>(input, normalized_shape, weight, eps, weight_offset, cast_before_weight);
  }
  Tensor rstd;
  const Tensor output =
      RmsNorm::apply(input, weight, normalized_shape, eps, weight_offset, cast_before_weight, &rstd);
  return {output, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                             SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                             const Tensor& rstd, std::optional<double> eps,
                                             std::array<bool, 2> output_mask, const OptionalTensor& grad_residual,
                                             double weight_offset, bool cast_before_weight) {
  if (way(grad_output, input, weight, grad_residual) != Way::kKernel) {
    return rms_norm_backward_formula<true>(grad_output, input, normalized_shape, weight, rstd, eps, output_mask, grad_residual,
                                     weight_offset, cast_before_weight);
  }
  return rms_norm_backward_op().redispatch(keys & c10::after_autograd_keyset, grad_output, input, normalized_shape, weight,
                                           rstd, eps, output_mask, grad_residual, weight_offset, cast_before_weight);
}

struct FusedAddRmsNorm : torch::autograd::Function<FusedAddRmsNorm> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                               const OptionalTensor& weight, std::optional<double> eps, double weight_offset,
                               bool cast_before_weight, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, sum, row_rstd] =
        fused_add_rms_norm_forward_op().call(input, residual, weight, eps, weight_offset, cast_before_weight);
    if (rstd) *rstd = row_rstd;
    ctx->save_for_backward({sum, weight.value_or(Tensor()), row_rstd});
    ctx->set_materialize_grads(false);
    if (!input.requires_grad() && !residual.requires_grad()) ctx->mark_non_differentiable({sum});
    if (eps) ctx->saved_data["eps"] = *eps;
    ctx->saved_data["weight_offset"] = weight_offset;
    ctx->saved_data["cast_before_weight"] = cast_before_weight;
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    return {output, sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& sum = saved[0];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    Tensor dsum = grads[1], dweight;
    if (grads[0].defined()) {
      const auto eps = ctx->saved_data.find("eps");
      const std::array<bool, 2> mask{ctx->needs_input_grad(0) || ctx->needs_input_grad(1), weight && ctx->needs_input_grad(2)};
      std::tie(dsum, dweight) = rms_norm_backward_op().call(
          grads[0], sum, sum.sym_sizes().slice(sum.dim() - 1), weight, saved[2],
          eps == ctx->saved_data.end() ? std::nullopt : std::optional<double>(eps->second.toDouble()), mask,
          grads[1].defined() ? OptionalTensor(grads[1]) : std::nullopt, ctx->saved_data["weight_offset"].toDouble(),
          ctx->saved_data["cast_before_weight"].toBool());
    }
    const auto input_dtype = static_cast<at::ScalarType>(ctx->saved_data["input_dtype"].toInt());
    return {dsum.defined() && ctx->needs_input_grad(0) ? dsum.to(input_dtype) : Tensor(), dsum, dweight, Tensor(), Tensor(),
            Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> fused_add_rms_norm(DispatchKeySet keys, const Tensor& input, const Tensor& residual,
                                              const OptionalTensor& weight, std::optional<double> eps,
                                              double weight_offset, bool cast_before_weight) {
  const Way taken = way(input, residual, weight);
  if (taken == Way::kKernel) {
    return fused_add_rms_norm_op().redispatch(keys & c10::after_autograd_keyset, input, residual, weight, eps, weight_offset,
                                              cast_before_weight);
  }
  if (taken == Way::kFormula) {
    return fused_add_rms_norm_formula<true>(input, residual, weight, eps, weight_offset, cast_before_weight);
  }
  const variable_list results =
      FusedAddRmsNorm::apply(input, residual, weight, eps, weight_offset, cast_before_weight, nullptr);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_forward(DispatchKeySet keys, const Tensor& input,
                                                              const Tensor& residual, const OptionalTensor& weight,
                                                              std::optional<double> eps, double weight_offset,
                                                              bool cast_before_weight) {
  const Way taken = way(input, residual, weight);
  if (taken == Way::kKernel) {
    return fused_add_rms_norm_forward_op().redispatch(keys & c10::after_autograd_keyset, input, residual, weight, eps,
                                                      weight_offset, cast_before_weight);
  }
  if (taken == Way::kFormula) {
    return fused_add_rms_norm_forward_formula<true>(input, residual, weight, eps, weight_offset, cast_before_weight);
  }
  Tensor rstd;
  const variable_list results =
      FusedAddRmsNorm::apply(input, residual, weight, eps, weight_offset, cast_before_weight, &rstd);
  return {results[0], results[1], rstd};
}

// An op without a gradient is refused where one would be recorded. What an op overwrites gets a new version, in inference
// mode too, so that autograd notices if it had saved the old values.
template <class Op>
struct Inference;
template <class R, class... Args>
struct Inference<R(Args...)> {
  template <auto op>
  static R call(DispatchKeySet keys, Args... args) {
    const auto differentiable = [](const auto& arg) {
      using T = std::decay_t<decltype(arg)>;
      if constexpr (std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>) return records_grad(arg) || has_tangent(arg);
      return false;
    };
    TORCH_CHECK(!(differentiable(args) || ...), op().operator_name(),
                ": it does not support automatic differentiation, but one of the arguments requires grad; call it under "
                "torch.no_grad()");
    return op().redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
  }
  template <auto op>
  static R bump(DispatchKeySet keys, Args... args) {
    const std::array<const Tensor*, sizeof...(Args)> tensors{address(args)...};
    op().redispatch(keys & c10::after_ADInplaceOrView_keyset, std::forward<Args>(args)...);
    const auto& arguments = op().schema().arguments();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto* alias = arguments[i].alias_info();
      if (alias && alias->isWrite()) tensors[i]->unsafeGetTensorImpl()->bump_version();
    }
  }
  // torch's own way with lazily negated tensors expects an op that writes to return what it wrote.
  template <auto op>
  static R negative(DispatchKeySet keys, Args... args) {
    const std::array<const Tensor*, sizeof...(Args)> tensors{address(args)...};
    for (const Tensor* t : tensors) {
      TORCH_CHECK(!t || !t->defined() || !t->is_neg(), op().operator_name(),
                  ": expected tensors without the negative bit; call resolve_neg() on them first");
    }
    return op().redispatch(keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), std::forward<Args>(args)...);
  }

 private:
  static const Tensor* address(const OptionalTensor& t) { return t ? &*t : nullptr; }
  static const Tensor* address(const Tensor& t) { return &t; }
  template <class T>
  static const Tensor* address(const T&) {
    return nullptr;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(rmsnorm_cuda, CompositeImplicitAutograd, m) {
  if (registered_elsewhere()) return;
  m.impl("rms_norm_formula", TORCH_FN(rms_norm_formula<false>));
  m.impl("rms_norm_forward_formula", TORCH_FN(rms_norm_forward_formula<false>));
  m.impl("rms_norm_backward_formula", TORCH_FN(rms_norm_backward_formula<false>));
  m.impl("fused_add_rms_norm_formula", TORCH_FN(fused_add_rms_norm_formula<false>));
  m.impl("fused_add_rms_norm_forward_formula", TORCH_FN(fused_add_rms_norm_forward_formula<false>));
}
TORCH_LIBRARY_IMPL(rmsnorm_cuda, Autograd, m) {
  if (registered_elsewhere()) return;
  m.impl("rms_norm", TORCH_FN(rms_norm));
  m.impl("rms_norm_forward", TORCH_FN(rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_FN(rms_norm_backward));
  m.impl("fused_add_rms_norm", TORCH_FN(fused_add_rms_norm));
  m.impl("fused_add_rms_norm_forward", TORCH_FN(fused_add_rms_norm_forward));
  m.impl("fused_add_rms_norm_", TORCH_FN((Inference<FusedInPlaceSignature>::call<fused_add_rms_norm__op>)));
  m.impl("rms_norm.out", TORCH_FN((Inference<OutSignature>::call<rms_norm_out_op>)));
  m.impl("fused_add_rms_norm.out", TORCH_FN((Inference<FusedOutSignature>::call<fused_add_rms_norm_out_op>)));
  m.impl("rms_norm_quant", TORCH_FN((Inference<QuantSignature>::call<rms_norm_quant_op>)));
  m.impl("rms_norm_quant.out", TORCH_FN((Inference<QuantOutSignature>::call<rms_norm_quant_out_op>)));
  m.impl("fused_add_rms_norm_quant", TORCH_FN((Inference<FusedQuantSignature>::call<fused_add_rms_norm_quant_op>)));
  m.impl("fused_add_rms_norm_quant.out", TORCH_FN((Inference<FusedQuantOutSignature>::call<fused_add_rms_norm_quant_out_op>)));
}
TORCH_LIBRARY_IMPL(rmsnorm_cuda, ADInplaceOrView, m) {
  if (registered_elsewhere()) return;
  m.impl("fused_add_rms_norm.out", TORCH_FN((Inference<FusedOutSignature>::bump<fused_add_rms_norm_out_op>)));
  m.impl("rms_norm_quant.out", TORCH_FN((Inference<QuantOutSignature>::bump<rms_norm_quant_out_op>)));
  m.impl("fused_add_rms_norm_quant.out", TORCH_FN((Inference<FusedQuantOutSignature>::bump<fused_add_rms_norm_quant_out_op>)));
  m.impl("rms_norm.out", TORCH_FN((Inference<OutSignature>::bump<rms_norm_out_op>)));
  m.impl("fused_add_rms_norm_", TORCH_FN((Inference<FusedInPlaceSignature>::bump<fused_add_rms_norm__op>)));
}

TORCH_LIBRARY_IMPL(rmsnorm_cuda, Negative, m) {
  if (registered_elsewhere()) return;
  m.impl("rms_norm.out", TORCH_FN((Inference<OutSignature>::negative<rms_norm_out_op>)));
  m.impl("fused_add_rms_norm_", TORCH_FN((Inference<FusedInPlaceSignature>::negative<fused_add_rms_norm__op>)));
  m.impl("fused_add_rms_norm.out", TORCH_FN((Inference<FusedOutSignature>::negative<fused_add_rms_norm_out_op>)));
  m.impl("rms_norm_quant.out", TORCH_FN((Inference<QuantOutSignature>::negative<rms_norm_quant_out_op>)));
  m.impl("fused_add_rms_norm_quant.out", TORCH_FN((Inference<FusedQuantOutSignature>::negative<fused_add_rms_norm_quant_out_op>)));
}

}  // namespace rmsnorm

// The residual addition before a norm, and the norm: fused_add_rms_norm, fused_add_rms_norm.out,
// fused_add_rms_norm_ (in place), fused_add_rms_norm_forward.
#include <ATen/TensorOperators.h>

#include "checks.h"
#include "formula.h"
#include "launch.h"
#include "ops.h"
#include "record.h"

namespace rmsnorm {
namespace {

struct Call {
  const Tensor& input;
  const Tensor& residual;
  const OptionalTensor& weight;
  NormOptions options;
  bool round_sum;  // is the sum normalized as it is rounded for the residual?

  int64_t lead() const { return input.dim() - 1; }
  at::ScalarType output_type() const { return rmsnorm::output_type(input, weight, options); }
};
struct OutCall {
  Call norm;
  const Tensor& out;
  const Tensor& residual_out;
};

constexpr const char* kName = "fused_add_rms_norm";

void check(const char* op, const Call& call) {
  check_residual(op, call.input, call.residual);
  check_last_dim(op, call.input, call.weight, call.options);
}

// ------------------------------------------------------------------------------------- forward

template <bool want_rstd>
std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_forward(const Call& call) {
  check(kName, call);
  Sum sum{call.residual, call.round_sum};
  auto [y, rstd] = forward(kName, call.input, call.lead(), call.weight, call.options,
                           call.output_type(), want_rstd, &sum);
  return {std::move(y), std::move(sum.result), std::move(rstd)};
}
std::tuple<Tensor, Tensor> fused_add_rms_norm(const Call& call) {
  auto [y, sum, rstd] = fused_add_rms_norm_forward<false>(call);
  return {std::move(y), std::move(sum)};
}

// The sum goes to residual_out, the norm to y; both may be what they are made of.
void write(const char* op, const Call& call, const Tensor& y, const char* y_name,
           const Tensor& residual_out, const char* residual_name) {
  const auto& [input, residual, weight, options, round_sum] = call;
  const int64_t lead = call.lead(), cols = input.size(lead);
  const Rows y_rows = check_written_rows(op, y_name, y, lead, cols, "input", input);
  check_written_rows(op, residual_name, residual_out, lead, cols, "residual", residual);
  if (weight) check_apart(op, y_name, y, "weight", *weight);
  if (weight) check_apart(op, residual_name, residual_out, "weight", *weight);
  check_apart(op, y_name, y, residual_name, residual_out, lead, cols);
  check_apart(op, y_name, y, "residual", residual, lead, cols);
  check_apart(op, residual_name, residual_out, "input", input, lead, cols);
  ForwardLaunch launch(op, residual_out, lead, weight, options);
  launch.add(input, residual, round_sum);
  launch.write_to(y, y_rows, /*stream=*/false);
  launch.run();
}

void fused_add_rms_norm_(const Call& call) {
  constexpr const char* op = "fused_add_rms_norm_";
  check(op, call);
  TORCH_CHECK(call.output_type() == call.input.scalar_type(), op, ": the result has dtype ",
              call.output_type(), " and cannot take the place of input, which has ",
              call.input.scalar_type(), "; use fused_add_rms_norm");
  if (call.input.is_meta() || call.input.numel() == 0) return;
  write(op, call, call.input, "input", call.residual, "residual");
}

void fused_add_rms_norm_out(const OutCall& call) {
  const auto& [norm, out, residual_out] = call;
  const Tensor& input = norm.input;
  check(kName, norm);
  check_tensor(kName, "out", out, input.sym_sizes(), norm.output_type());
  check_tensor(kName, "residual_out", residual_out, input.sym_sizes(), norm.residual.scalar_type());
  if (input.is_meta() || input.numel() == 0) return;
  write(kName, norm, out, "out", residual_out, "residual_out");
}

// Only the narrower dtype of the output, and of an unrounded sum that of the cast, differ from the
// norm of the sum.
template <Rescaling rescaling>
std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_forward_formula(const Call& call) {
  const auto& [input, residual, weight, options, round_sum] = call;
  check_residual(kName, input, residual);
  const at::ScalarType compute = compute_type(input, std::nullopt), type = residual.scalar_type();
  const Tensor sum = input.to(compute) + residual.to(compute), rounded = sum.to(type);
  const SymIntArrayRef last = sum.sym_sizes().slice(sum.dim() - 1);
  const Formula formula(kName, rescaling, round_sum ? rounded : sum, last, weight, options, type);
  return {formula.output().to(call.output_type()), rounded, formula.rstd()};
}
template <Rescaling rescaling>
std::tuple<Tensor, Tensor> fused_add_rms_norm_formula(const Call& call) {
  auto [output, sum, rstd] = fused_add_rms_norm_forward_formula<rescaling>(call);
  return {std::move(output), std::move(sum)};
}

// ------------------------------------------------------------------------------------ recorded

struct Record : torch::autograd::Function<Record> {
  static constexpr bool is_traceable = true;  // as in rms_norm.cpp

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                               const OptionalTensor& weight, const NormOptions& options,
                               bool round_sum, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output, sum;
    std::tie(output, sum, *rstd) = ops::fused_add_rms_norm_forward::call(
        input, residual, weight, options.eps, options.weight_offset, options.cast_before_weight,
        round_sum);
    ctx->save_for_backward({sum, weight.value_or(Tensor()), *rstd});
    ctx->set_materialize_grads(false);
    if (!input.requires_grad() && !residual.requires_grad()) ctx->mark_non_differentiable({sum});
    save(ctx, options);
    if (input.scalar_type() != residual.scalar_type()) {
      ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    }
    return {output, sum};
  }

  // The gradient that flows into the sum is added in the pass that forms that of the norm.
  // Roundings count as the identity: that of the sum as it was rounded, by the rstd of what was
  // normalized.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& sum = saved[0];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const bool sum_grad = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    Tensor dsum = grads[1], dweight;
    if (grads[0].defined()) {
      const NormOptions options = saved_options(ctx);
      std::tie(dsum, dweight) = ops::rms_norm_backward::call(
          grads[0], sum, sum.sym_sizes().slice(sum.dim() - 1), weight, saved[2], options.eps,
          {sum_grad, weight && ctx->needs_input_grad(2)},
          grads[1].defined() ? OptionalTensor(grads[1]) : std::nullopt, options.weight_offset,
          options.cast_before_weight);
    }
    Tensor dinput;
    if (dsum.defined() && ctx->needs_input_grad(0)) {
      const auto dtype = ctx->saved_data.find("input_dtype");
      dinput = dtype == ctx->saved_data.end()
                   ? dsum
                   : dsum.to(static_cast<at::ScalarType>(dtype->second.toInt()));
    }
    return {dinput, dsum, dweight, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> record_forward(const Call& call) {
  Tensor rstd;
  const variable_list results =
      Record::apply(call.input, call.residual, call.weight, call.options, call.round_sum, &rstd);
  return {results[0], results[1], rstd};
}
std::tuple<Tensor, Tensor> record(const Call& call) {
  auto [output, sum, rstd] = record_forward(call);
  return {std::move(output), std::move(sum)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) return;
  constexpr auto kPlain = Rescaling::kPlain, kRescaled = Rescaling::kRescaled;
  const std::string options =
      "*, float weight_offset=0.0, bool cast_before_weight=False, bool round_sum=True";
  const std::string tensors = "Tensor? weight=None, float? eps=None, " + options;
  const std::string arguments = "Tensor input, Tensor residual, " + tensors;
  ops::fused_add_rms_norm::define<fused_add_rms_norm, fused_add_rms_norm_formula<kRescaled>, record,
                                  fused_add_rms_norm_formula<kPlain>>(
      m, arguments, "(Tensor output, Tensor residual_out)");
  ops::fused_add_rms_norm_forward::define<
      fused_add_rms_norm_forward<true>, fused_add_rms_norm_forward_formula<kRescaled>,
      record_forward, fused_add_rms_norm_forward_formula<kPlain>>(
      m, arguments, "(Tensor output, Tensor residual_out, Tensor rstd)");
  ops::fused_add_rms_norm_::define<fused_add_rms_norm_>(
      m, "Tensor(a!) input, Tensor(b!) residual, " + tensors, "()");
  ops::fused_add_rms_norm_out::define<fused_add_rms_norm_out>(
      m, arguments + ", Tensor(a!) out, Tensor(b!) residual_out", "()");
}

}  // namespace rmsnorm

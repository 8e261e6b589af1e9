// The norm and its gradient: rms_norm, rms_norm.out, rms_norm_forward, rms_norm_backward.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "formula.h"
#include "launch.h"
#include "ops.h"
#include "record.h"

namespace rmsnorm {
namespace {

struct Call {
  const Tensor& input;
  SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  NormOptions options;
};
struct OutCall {
  Call norm;
  const Tensor& out;
};
struct BackwardCall {
  const Tensor& grad_output;
  const Tensor& input;
  SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  const Tensor& rstd;
  std::optional<double> eps;
  std::array<bool, 2> output_mask;
  const OptionalTensor& grad_residual;
  double weight_offset;
  bool cast_before_weight;

  NormOptions options() const { return {eps, weight_offset, cast_before_weight}; }
};

constexpr const char* kName = "rms_norm";

int64_t lead_of(const Tensor& input, SymIntArrayRef normalized_shape) {
  return input.dim() - static_cast<int64_t>(normalized_shape.size());
}

// ------------------------------------------------------------------------------------- forward

template <bool want_rstd>
std::tuple<Tensor, Tensor> rms_norm_forward(const Call& call) {
  const auto& [input, normalized_shape, weight, options] = call;
  check_norm(kName, input, normalized_shape, weight, options);
  return forward(kName, input, lead_of(input, normalized_shape), weight, options,
                 output_type(input, weight, options), want_rstd);
}
Tensor rms_norm(const Call& call) { return std::get<0>(rms_norm_forward<false>(call)); }

void rms_norm_out(const OutCall& call) {
  const auto& [input, normalized_shape, weight, options] = call.norm;
  const Tensor& out = call.out;
  check_norm(kName, input, normalized_shape, weight, options);
  check_tensor(kName, "out", out, input.sym_sizes(), output_type(input, weight, options));
  if (input.is_meta() || input.numel() == 0) return;
  const int64_t lead = lead_of(input, normalized_shape);
  ForwardLaunch launch(kName, input, lead, weight, options);
  const Rows rows = check_written_rows(kName, "out", out, lead, launch.cols(), "input", input);
  if (weight) check_apart(kName, "out", out, "weight", *weight);
  launch.write_to(out, rows, cpu::writes_past_caches(out.nbytes(), false));
  launch.run();
}

template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_forward_formula(const Call& call) {
  const auto& [input, normalized_shape, weight, options] = call;
  const Formula formula(kName, rescaling, input, normalized_shape, weight, options);
  return {formula.output(), formula.rstd()};
}
template <Rescaling rescaling>
Tensor rms_norm_formula(const Call& call) {
  const auto& [input, normalized_shape, weight, options] = call;
  return Formula(kName, rescaling, input, normalized_shape, weight, options).output();
}

// ------------------------------------------------------------------------------------ backward

std::tuple<Tensor, Tensor> rms_norm_backward(const BackwardCall& call) {
  constexpr const char* op = "rms_norm_backward";
  const Tensor &grad_output = call.grad_output, &input = call.input, &rstd = call.rstd;
  const OptionalTensor &weight = call.weight, &grad_residual = call.grad_residual;
  const SymIntArrayRef normalized_shape = call.normalized_shape;
  const auto [want_dx, want_dweight] = call.output_mask;
  const int64_t lead = lead_of(input, normalized_shape);
  check_norm(op, input, normalized_shape, weight, call.options());
  check_dtype(op, "grad_output", grad_output);
  const SymIntArrayRef sizes = input.sym_sizes();
  check_tensor(op, "grad_output", grad_output, sizes);
  check_tensor(op, "rstd", rstd, sizes.slice(0, lead), rstd_type(input));
  if (grad_residual) {
    check_tensor(op, "grad_residual", *grad_residual, sizes, input.scalar_type());
  }
  std::tuple<Tensor, Tensor> grads;
  auto& [dx, dweight] = grads;
  if (want_dx) dx = allocate(sizes, input, input.scalar_type());
  if (want_dweight && weight) dweight = at::empty_symint(normalized_shape, weight->options());
  if (input.is_meta() || (!dx.defined() && !dweight.defined())) return grads;
  if (input.numel() == 0) {
    if (dweight.defined()) dweight.zero_();
    return grads;
  }

  const Placed dy = place(grad_output, lead), x = place(input, lead);
  const Placed dresidual = grad_residual ? place(*grad_residual, lead) : Placed{};
  const auto w = dense(weight), dense_rstd = rstd.expect_contiguous();
  RmsNormBackward p{};
  set_norm(p, x, lead, *w, call.options());
  p.dy = dy.tensor->const_data_ptr();
  p.dy_rows = dy.rows;
  p.dy_dtype = dtype(grad_output);
  p.rstd = dense_rstd->const_data_ptr();
  if (grad_residual) {
    p.dresidual = dresidual.tensor->const_data_ptr();
    p.dresidual_rows = dresidual.rows;
  }
  p.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  p.dweight = dweight.defined() ? dweight.mutable_data_ptr() : nullptr;
  p.stream = dx.defined() && cpu::writes_past_caches(dx.nbytes(), true);
  p.fresh = dx.defined();
  const auto allocate_workspace = [&](int64_t bytes) {
    const Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
    p.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
    return workspace;
  };
  if (!input.is_cpu()) {
    run_cuda(op, input, [&](void* stream) {
      const Tensor workspace = allocate_workspace(cuda::rms_norm_backward_workspace(p));
      return cuda::rms_norm_backward(p, stream);
    });
    return grads;
  }
  cpu::isa();  // throws outside the parallel region if the environment asks for what is not there
  const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  const int64_t row_bytes =
      p.cols * static_cast<int64_t>(2 * input.element_size() + grad_output.element_size());
  parallel_for(plan.blocks, grain(std::min(plan.block_rows, p.rows) * row_bytes),
               [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(p, begin, end); });
  if (dweight.defined()) {
    parallel_for(p.cols, grain(plan.workspace_bytes / p.cols), [&](int64_t begin, int64_t end) {
      cpu::rms_norm_backward_dweight(p, begin, end);
    });
  }
  return grads;
}

template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_backward_formula(const BackwardCall& call) {
  const Formula formula("rms_norm_backward", rescaling, call.input, call.normalized_shape,
                        call.weight, call.options());
  return formula.backward(call.grad_output, call.output_mask, call.grad_residual);
}

// ------------------------------------------------------------------------------------ recorded

struct Record : torch::autograd::Function<Record> {
  // Nothing but tensors, numbers and ops: compiled autograd may trace it.
  static constexpr bool is_traceable = true;

  // rstd goes out beside the differentiable result, by pointer, so that it has no gradient.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        SymIntArrayRef normalized_shape, const NormOptions& options, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output;
    std::tie(output, *rstd) =
        ops::rms_norm_forward::call(input, normalized_shape, weight, options.eps,
                                    options.weight_offset, options.cast_before_weight);
    ctx->save_for_backward({input, weight.value_or(Tensor()), *rstd});
    save(ctx, options);
    if (normalized_shape.size() != 1) {
      ctx->saved_data["normalized_dims"] = static_cast<int64_t>(normalized_shape.size());
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& input = saved[0];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const NormOptions options = saved_options(ctx);
    const auto dims = ctx->saved_data.find("normalized_dims");
    const int64_t lead = input.dim() - (dims == ctx->saved_data.end() ? 1 : dims->second.toInt());
    auto [dx, dweight] = ops::rms_norm_backward::call(
        grads[0], input, input.sym_sizes().slice(lead), weight, saved[2], options.eps,
        {ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1)}, std::nullopt,
        options.weight_offset, options.cast_before_weight);
    return {dx, dweight, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> record_forward(const Call& call) {
  const auto& [input, normalized_shape, weight, options] = call;
  Tensor rstd, output = Record::apply(input, weight, normalized_shape, options, &rstd);
  return {std::move(output), std::move(rstd)};
}
Tensor record(const Call& call) { return std::get<0>(record_forward(call)); }

}  // namespace

bool registered_elsewhere() {
  // First asked before anything of this copy is defined.
  static const bool is =
      c10::Dispatcher::singleton().findSchema({"rmsnorm_cuda::rms_norm", ""}).has_value();
  return is;
}

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) {
    TORCH_WARN(
        "rmsnorm_cuda: another copy of librmsnorm_torch.so was loaded before, and its ops "
        "are used");
    return;
  }
  constexpr auto kPlain = Rescaling::kPlain, kRescaled = Rescaling::kRescaled;
  const std::string options = "*, float weight_offset=0.0, bool cast_before_weight=False";
  const std::string norm =
      "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, " + options;
  ops::rms_norm::define<rms_norm, rms_norm_formula<kRescaled>, record, rms_norm_formula<kPlain>>(
      m, norm, "Tensor");
  ops::rms_norm_forward::define<rms_norm_forward<true>, rms_norm_forward_formula<kRescaled>,
                                record_forward, rms_norm_forward_formula<kPlain>>(
      m, norm, "(Tensor output, Tensor rstd)");
  // A backward that is itself recorded goes through the formula, for second derivatives.
  ops::rms_norm_backward::define<rms_norm_backward, rms_norm_backward_formula<kRescaled>,
                                 rms_norm_backward_formula<kRescaled>,
                                 rms_norm_backward_formula<kPlain>>(
      m,
      "Tensor grad_output, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor rstd, "
      "float? eps, bool[2] output_mask, Tensor? grad_residual=None, " +
          options,
      "(Tensor grad_input, Tensor grad_weight)");
  ops::rms_norm_out::define<rms_norm_out>(m, norm + ", Tensor(a!) out", "()");
}

}  // namespace rmsnorm

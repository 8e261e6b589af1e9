// Norms with a gate, and norms of groups of columns: rms_norm_gated, rms_norm_gated.out,
// rms_norm_gated_forward, rms_norm_gated_backward.
#include "gated.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>

#include "checks.h"
#include "formula.h"
#include "launch.h"
#include "ops.h"
#include "record.h"

namespace rmsnorm {
namespace {

using gated::Call, gated::Options;

struct OutCall {
  Call gated;
  const Tensor& out;
};
struct BackwardCall {
  const Tensor& grad_output;
  const Tensor& input;
  const OptionalTensor& gate;
  const OptionalTensor& weight;
  const Tensor& rstd;
  std::optional<double> eps;
  std::array<bool, 3> output_mask;  // of the gradients of input, gate, weight
  Options options;

  Call forward() const { return {input, gate, weight, eps, options}; }
};

// What errors name: rms_norm(group_size=) comes here without a gate.
const char* name_of(const Call& call) {
  return call.gate ? "rms_norm_gated" : "rms_norm of groups";
}

// ------------------------------------------------------------------------------------- launch

// The tensors that both directions read, as they lie.
struct Operands {
  Placed x, gate;
  c10::MaybeOwned<Tensor> weight;

  explicit Operands(const Call& call)
      : x(place(call.input, call.lead())), weight(dense(call.weight)) {
    if (call.gate) gate = place(*call.gate, call.lead());
  }

  // All that a kernel is told, but for its results.
  template <class Params>
  void set(Params& p, const Call& call) const {
    const Options& options = call.options;
    set_norm(p.norm, x, call.lead(), *weight, call.norm());
    p.gate.dtype = p.norm.x_dtype;
    if (call.gate) {
      const bool is_sigmoid = options.activation == "sigmoid";
      p.gate = {gate.tensor->const_data_ptr(), gate.rows, dtype(*gate.tensor),
                is_sigmoid ? Activation::kSigmoid : Activation::kSilu, call.gate_is_first()};
    }
    p.groups = options.group_size ? p.norm.cols / *options.group_size : 1;
  }
};

}  // namespace

void gated::check(const char* op, const Call& call) {
  const auto& [input, gate, weight, eps, options] = call;
  const std::string_view activation = options.activation;
  check_last_dim(op, input, weight, call.norm());
  if (gate) {
    check_dtype(op, "gate", *gate);
    check_tensor(op, "gate", *gate, input.sym_sizes());
  }
  TORCH_CHECK_VALUE(activation == "silu" || activation == "sigmoid", op,
                    ": expected activation to be 'silu' or 'sigmoid', but got '", activation, "'");
  if (!options.group_size) return;
  TORCH_CHECK_VALUE(*options.group_size > 0, op, ": expected group_size to be positive, but got ",
                    *options.group_size);
  TORCH_SYM_CHECK((input.sym_size(-1) % *options.group_size).sym_eq(0), op,
                  ": expected rows of whole groups of ", *options.group_size,
                  " columns, but got input of size ", input.sym_sizes());
}

void gated::run(const char* op, const Call& call, const RmsNormForward& results) {
  const Operands operands(call);
  RmsNormGated p{};
  p.norm = results;
  operands.set(p, call);
  RmsNormForward& norm = p.norm;
  norm.stream = norm.stream && norm.x != norm.y;
  if (!call.input.is_cpu()) {
    Tensor y;
    if (!norm.y && p.scales_span_groups()) {
      y = at::empty({norm.rows, norm.cols}, call.input.options().dtype(call.output_type()));
      norm.y = y.mutable_data_ptr();
      norm.y_rows = dense_rows(norm.cols);
    }
    return run_cuda(op, call.input,
                    [&](void* stream) { return cuda::rms_norm_gated_forward(p, stream); });
  }
  cpu::isa();  // throws outside the parallel region if the environment asks for what is not there
  const int64_t rows = norm.rows;
  const int64_t bytes =
      size_of(norm.x_dtype) + size_of(norm.y_dtype) + (p.gate.data ? size_of(p.gate.dtype) : 0);
  in_parts(rows, norm.cols * bytes, cpu::rms_norm_gated_workspace(p), call.input,
           [&](int64_t part, int64_t parts, void* workspace) {
             cpu::rms_norm_gated_forward(p, part * rows / parts, (part + 1) * rows / parts,
                                         workspace);
           });
}

namespace {

// ------------------------------------------------------------------------------------- forward

RmsNormForward result(const Tensor& y, const Rows& rows, bool is_new) {
  RmsNormForward p{};
  p.y = y.mutable_data_ptr();
  p.y_rows = rows;
  p.y_dtype = dtype(y);
  p.stream = cpu::writes_past_caches(y.nbytes(), is_new);
  p.fresh = is_new;
  return p;
}

template <bool want_rstd>
std::tuple<Tensor, Tensor> rms_norm_gated_forward(const Call& call) {
  gated::check(name_of(call), call);
  const Tensor& input = call.input;
  Tensor y = allocate(input.sym_sizes(), input, call.output_type()), rstd;
  if (want_rstd) rstd = allocate(call.rstd_shape(), input, call.rstd_type());
  if (input.is_meta()) return {y, rstd};
  if (input.numel() == 0) {
    if (want_rstd) rstd.fill_(std::numeric_limits<double>::quiet_NaN());  // a mean over nothing
    return {y, rstd};
  }
  RmsNormForward results = result(y, dense_rows(input.size(-1)), /*is_new=*/true);
  if (want_rstd) results.rstd = rstd.mutable_data_ptr();
  gated::run(name_of(call), call, results);
  return {y, rstd};
}
Tensor rms_norm_gated(const Call& call) { return std::get<0>(rms_norm_gated_forward<false>(call)); }

void rms_norm_gated_out(const OutCall& out_call) {
  const auto& [call, out] = out_call;
  gated::check(name_of(call), call);
  const Tensor& input = call.input;
  check_tensor(name_of(call), "out", out, input.sym_sizes(), call.output_type());
  if (input.is_meta() || input.numel() == 0) return;
  const int64_t lead = call.lead(), cols = input.size(-1);
  const Rows rows = check_written_rows(name_of(call), "out", out, lead, cols, "input", input);
  if (call.gate) check_apart(name_of(call), "out", out, "gate", *call.gate, lead, cols);
  if (call.weight) check_apart(name_of(call), "out", out, "weight", *call.weight);
  gated::run(name_of(call), call, result(out, rows, /*is_new=*/false));
}

// ------------------------------------------------------------------------------------ backward

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_backward(const BackwardCall& call) {
  constexpr const char* op = "rms_norm_gated_backward";
  const Call forward = call.forward();
  const Tensor &grad_output = call.grad_output, &input = call.input;
  const auto [want_dx, want_dgate, want_dweight] = call.output_mask;
  gated::check(op, forward);
  check_dtype(op, "grad_output", grad_output);
  check_tensor(op, "grad_output", grad_output, input.sym_sizes());
  check_tensor(op, "rstd", call.rstd, forward.rstd_shape(), forward.rstd_type());
  std::tuple<Tensor, Tensor, Tensor> grads;
  auto& [dx, dgate, dweight] = grads;
  if (want_dx) dx = allocate(input.sym_sizes(), input, input.scalar_type());
  if (want_dgate && call.gate) {
    dgate = allocate(input.sym_sizes(), input, call.gate->scalar_type());
  }
  if (want_dweight && call.weight) {
    dweight = at::empty_symint(call.weight->sym_sizes(), call.weight->options());
  }
  if (input.is_meta() || !(dx.defined() || dgate.defined() || dweight.defined())) return grads;
  if (input.numel() == 0) {
    if (dweight.defined()) dweight.zero_();
    return grads;
  }

  const Operands operands(forward);
  const Placed dy = place(grad_output, forward.lead());
  const auto rstd = call.rstd.expect_contiguous();
  RmsNormGatedBackward p{};
  operands.set(p, forward);
  p.norm.dy = dy.tensor->const_data_ptr();
  p.norm.dy_rows = dy.rows;
  p.norm.dy_dtype = dtype(grad_output);
  p.norm.rstd = rstd->const_data_ptr();
  p.norm.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  p.norm.dweight = dweight.defined() ? dweight.mutable_data_ptr() : nullptr;
  p.dgate = dgate.defined() ? dgate.mutable_data_ptr() : nullptr;
  const Tensor& large = dx.defined() ? dx : dgate;
  p.norm.stream = large.defined() && cpu::writes_past_caches(large.nbytes(), true);
  p.norm.fresh = large.defined();
  const auto allocate_workspace = [&](int64_t bytes) {
    const Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
    p.norm.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
    return workspace;
  };
  if (!input.is_cpu()) {
    run_cuda(op, input, [&](void* stream) {
      const Tensor workspace = allocate_workspace(cuda::rms_norm_gated_backward_workspace(p));
      return cuda::rms_norm_gated_backward(p, stream);
    });
    return grads;
  }
  cpu::isa();  // as in the forward
  const cpu::BackwardPlan plan = cpu::rms_norm_gated_backward_plan(p);
  const Tensor workspace = allocate_workspace(plan.workspace_bytes);
  const int64_t bytes = 2 * size_of(p.norm.x_dtype) + size_of(p.norm.dy_dtype) +
                        (p.gate.data ? 2 * size_of(p.gate.dtype) : 0);
  in_parts(plan.blocks, std::min(plan.block_rows, p.norm.rows) * p.norm.cols * bytes,
           cpu::rms_norm_gated_backward_workspace(p), input,
           [&](int64_t part, int64_t parts, void* tiles) {
             cpu::rms_norm_gated_backward(p, part * plan.blocks / parts,
                                          (part + 1) * plan.blocks / parts, tiles);
           });
  if (dweight.defined()) {
    parallel_for(
        p.norm.cols, grain(plan.workspace_bytes / p.norm.cols),
        [&](int64_t begin, int64_t end) { cpu::rms_norm_gated_backward_dweight(p, begin, end); });
  }
  return grads;
}

// ------------------------------------------------------------------------------------- formula

class GatedFormula {
 public:
  // casts: whether what the weight multiplies is rounded before.
  GatedFormula(const char* op, Rescaling rescaling, const Call& call, bool casts)
      : call_((gated::check(op, call), call)),
        compute_(call.compute_type()),
        x_(call.input.to(compute_)),
        gate_(call.gate ? call.gate->to(compute_) : Tensor()),
        sigmoid_(call.gate ? at::sigmoid(gate_) : Tensor()),
        weight_(call.weight ? OptionalTensor(by_group(*call.weight)) : std::nullopt),
        norm_(op, rescaling, by_group(call.gate_is_first() ? x_ * act() : x_), 1,
              call.options.group_size ? 2 : 1, weight_,
              {eps_or_default(call.eps, call.input), call.options.weight_offset,
               call.options.cast_before_weight && casts},
              call.input.scalar_type()) {}

  Tensor output() const {
    const Tensor y = product();
    const bool is_gated = call_.gate && !call_.gate_is_first();
    return (is_gated ? y * act() : y).to(call_.output_type());
  }
  Tensor rstd() const {
    const Tensor rstd = norm_.rstd().to(call_.rstd_type());
    return call_.options.group_size ? rstd.movedim(-1, 0) : rstd;
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const BackwardCall& call) const {
    const auto [want_dx, want_dgate, want_dweight] = call.output_mask;
    const bool gate_is_first = call_.gate_is_first(), gate_is_last = call_.gate && !gate_is_first;
    const bool gives_dgate = want_dgate && call_.gate;
    const Tensor dy = call.grad_output.to(compute_);
    auto [dx, dweight] =
        norm_.backward(by_group(gate_is_last ? dy * act() : dy),
                       {want_dx || (gate_is_first && gives_dgate), want_dweight}, std::nullopt);
    if (dx.defined()) dx = as_rows(dx);
    Tensor dgate;
    if (gives_dgate) {
      const Tensor of_act = gate_is_first ? dx * x_ : dy * product();
      dgate = (of_act * slope()).to(call_.gate->scalar_type());
    }
    if (gate_is_first && want_dx) dx = dx * act();
    if (dweight.defined()) dweight = as_rows(dweight).to(call_.weight->scalar_type());
    return {want_dx ? dx.to(call_.input.scalar_type()) : Tensor(), dgate, dweight};
  }

 private:
  // [..., groups, group_size].
  Tensor by_group(const Tensor& t) const {
    const auto& size = call_.options.group_size;
    return size ? t.unflatten_symint(-1, {t.sym_size(-1) / *size, *size}) : t;
  }
  Tensor as_rows(const Tensor& t) const { return call_.options.group_size ? t.flatten(-2) : t; }

  bool is_silu() const { return call_.options.activation == "silu"; }
  Tensor act() const { return is_silu() ? gate_ * sigmoid_ : sigmoid_; }
  Tensor slope() const {  // of act(), by the gate
    const Tensor slope = sigmoid_ * (1 - sigmoid_);
    return is_silu() ? sigmoid_ + gate_ * slope : slope;
  }
  // The norm times the weight, rounded where that is asked for ahead of a gate.
  Tensor product() const {
    const Tensor product = as_rows(norm_.product());
    const bool rounds = call_.options.cast_before_weight && call_.weight && !call_.gate_is_first();
    return rounds ? product.to(call_.product_type()).to(compute_) : product;
  }

  const Call& call_;
  const at::ScalarType compute_;
  const Tensor x_, gate_, sigmoid_;
  const OptionalTensor weight_;
  const Formula norm_;
};

template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_gated_forward_formula(const Call& call) {
  const GatedFormula formula(name_of(call), rescaling, call, /*casts=*/true);
  return {formula.output(), formula.rstd()};
}
template <Rescaling rescaling>
Tensor rms_norm_gated_formula(const Call& call) {
  return GatedFormula(name_of(call), rescaling, call, /*casts=*/true).output();
}
template <Rescaling rescaling>
std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_backward_formula(const BackwardCall& call) {
  constexpr const char* op = "rms_norm_gated_backward";
  const Call forward = call.forward();
  check_tensor(op, "grad_output", call.grad_output, call.input.sym_sizes());
  return GatedFormula(op, rescaling, forward, !forward.gate_is_first()).backward(call);
}

// ------------------------------------------------------------------------------------ recorded

struct Record : torch::autograd::Function<Record> {
  static constexpr bool is_traceable = true;  // as in rms_norm.cpp

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& gate,
                        const OptionalTensor& weight, const Call* call, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Options& options = call->options;
    Tensor output;
    std::tie(output, *rstd) = ops::rms_norm_gated_forward::call(
        input, gate, weight, call->eps, options.activation, options.norm_before_gate,
        options.group_size, options.weight_offset, options.cast_before_weight);
    ctx->save_for_backward({input, gate.value_or(Tensor()), weight.value_or(Tensor()), *rstd});
    save(ctx, call->norm());
    auto& data = ctx->saved_data;
    if (options.activation != "silu") data["activation"] = std::string(options.activation);
    if (!options.norm_before_gate) data["gate_is_first"] = true;
    if (options.group_size) data["group_size"] = *options.group_size;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor gate = optional(saved[1]), weight = optional(saved[2]);
    const size_t of_weight = 1 + gate.has_value();  // absent tensors are not counted
    const auto& data = ctx->saved_data;
    const auto activation = data.find("activation"), group_size = data.find("group_size");
    const NormOptions norm = saved_options(ctx);
    auto [dx, dgate, dweight] = ops::rms_norm_gated_backward::call(
        grads[0], saved[0], gate, weight, saved[3], norm.eps,
        {ctx->needs_input_grad(0), gate && ctx->needs_input_grad(1),
         weight && ctx->needs_input_grad(of_weight)},
        activation == data.end() ? std::string_view("silu") : activation->second.toStringView(),
        data.count("gate_is_first") == 0,
        group_size == data.end() ? std::nullopt : std::optional(group_size->second.toInt()),
        norm.weight_offset, norm.cast_before_weight);
    return {dx, dgate, dweight, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> record_forward(const Call& call) {
  Tensor rstd, output = Record::apply(call.input, call.gate, call.weight, &call, &rstd);
  return {std::move(output), std::move(rstd)};
}
Tensor record(const Call& call) { return std::get<0>(record_forward(call)); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) return;
  constexpr auto kPlain = Rescaling::kPlain, kRescaled = Rescaling::kRescaled;
  const std::string options =
      "*, str activation=\"silu\", bool norm_before_gate=True, int? group_size=None, "
      "float weight_offset=0.0, bool cast_before_weight=False";
  const std::string arguments =
      "Tensor input, Tensor? gate, Tensor? weight=None, float? eps=None, " + options;
  ops::rms_norm_gated::define<rms_norm_gated, rms_norm_gated_formula<kRescaled>, record,
                              rms_norm_gated_formula<kPlain>>(m, arguments, "Tensor");
  ops::rms_norm_gated_forward::define<rms_norm_gated_forward<true>,
                                      rms_norm_gated_forward_formula<kRescaled>, record_forward,
                                      rms_norm_gated_forward_formula<kPlain>>(
      m, arguments, "(Tensor output, Tensor rstd)");
  ops::rms_norm_gated_backward::define<
      rms_norm_gated_backward, rms_norm_gated_backward_formula<kRescaled>,
      rms_norm_gated_backward_formula<kRescaled>, rms_norm_gated_backward_formula<kPlain>>(
      m,
      "Tensor grad_output, Tensor input, Tensor? gate, Tensor? weight, Tensor rstd, float? eps, "
      "bool[3] output_mask, " +
          options,
      "(Tensor grad_input, Tensor grad_gate, Tensor grad_weight)");
  ops::rms_norm_gated_out::define<rms_norm_gated_out>(m, arguments + ", Tensor(a!) out", "()");
}

}  // namespace rmsnorm

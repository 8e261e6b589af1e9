// The norm of what a sublayer returned, and the residual addition: rms_norm_add, rms_norm_add.out,
// rms_norm_add_forward. And then the norm of that sum: rms_norm_add_rms_norm,
// rms_norm_add_rms_norm.out, rms_norm_add_rms_norm_ (in place), rms_norm_add_rms_norm_forward.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "formula.h"
#include "launch.h"
#include "ops.h"
#include "record.h"

namespace rmsnorm {
namespace {

struct Call {  // of rms_norm_add
  const Tensor& input;
  const Tensor& residual;
  const OptionalTensor& weight;
  NormOptions options;
};
struct OutCall {
  Call norm;
  const Tensor& out;
};
struct PairCall {  // of rms_norm_add_rms_norm
  const Tensor& input;
  const Tensor& residual;
  const OptionalTensor& input_weight;
  const OptionalTensor& weight;
  std::optional<double> eps;
  double scale;
  double weight_offset;
  bool cast_before_weight;

  NormOptions options() const { return {eps, weight_offset, cast_before_weight}; }
  at::ScalarType norm_type() const { return output_type(input, input_weight, options()); }
  // A norm of the sum, narrowed to what was added.
  at::ScalarType output_type_of_pair() const {
    const at::ScalarType narrow = norm_type();
    return options().cast_before_weight && weight ? c10::promoteTypes(narrow, weight->scalar_type())
                                                  : narrow;
  }
};
struct PairOutCall {
  PairCall pair;
  const Tensor& out;
  const Tensor& residual_out;
};

constexpr const char *kAdd = "rms_norm_add", *kPair = "rms_norm_add_rms_norm";

void check(const char* op, const Call& call) {
  check_last_dim(op, call.input, call.weight, call.options);
  check_residual(op, call.input, call.residual, output_type(call.input, call.weight, call.options));
}

void check(const char* op, const PairCall& call) {
  const SymIntArrayRef last = check_last_dim(op, call.input, call.weight, call.options());
  if (call.input_weight) {
    check_dtype(op, "input_weight", *call.input_weight);
    check_tensor(op, "input_weight", *call.input_weight, last);
  }
  TORCH_CHECK_VALUE(std::isfinite(call.scale), op, ": expected scale to be finite, but got ",
                    call.scale);
  check_residual(op, call.input, call.residual, call.norm_type());
}

// ------------------------------------------------------------------------------------- launch

// What is written. `sum` has rows that a kernel can walk, and so has `output`, which only the pair
// has.
struct Results {
  Tensor output, sum, input_rstd, rstd;
  Rows output_rows{}, sum_rows{};
  bool are_new;
};

void* data_of(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Norms of rows on their way to the sum: an eighth of an L2 cache, as the kernels' own tiles. Each
// tile pays for two calls, and for weights that are turned into floats. One core of an Emerald
// Rapids, time over that of the two calls on all rows, tiles of 16, 64, 256, 2048 KiB: bf16 64x2304
// 2.3, 1.23, 1.05, 0.98, 2048x2304 1.67, 0.76, 0.84, 0.81; fp32 64x2304 0.97, 0.85, 0.93, 0.96,
// 2048x2304 1.09, 0.84, 0.83, 1.00.
int64_t tile_bytes() {
  static const int64_t bytes =
      std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) / 8, 64 << 10, 256 << 10);
  return bytes;
}

// f(T{}) of the C++ type of a dtype.
template <class F>
void with_type(DType type, const F& f) {
  if (type == DType::kFloat32) return f(float{});
  if (type == DType::kFloat64) return f(double{});
  if (type == DType::kFloat16) return f(at::Half{});
  f(at::BFloat16{});
}

// As torch multiplies by a number, in fp32 (fp64) and rounded.
template <class T, class Compute>
T times(T x, Compute factor) {
  return static_cast<T>(static_cast<Compute>(x) * factor);
}
// By the bits: with a branch, as c10 rounds, or with a comparison of floats, the loop stays scalar.
inline at::BFloat16 times(at::BFloat16 x, float factor) {
  const uint32_t wide = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  value *= factor;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  x.x = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
  return x;
}

void scale_rows(const RmsNormForward& p, double scale, int64_t begin, int64_t end) {
  with_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto factor = static_cast<at::opmath_type<T>>(scale);
    for (int64_t row = begin; row < end; ++row) {
      T* const x = static_cast<T*>(const_cast<void*>(p.x)) + p.x_rows.offset(row);
#pragma omp simd
      for (int64_t i = 0; i < p.cols; ++i) x[i] = times(x[i], factor);
    }
  });
}

// For what takes no first row: where row 0 of a tile would be.
void* row_0_of(void* tile, int64_t row, int64_t row_bytes) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tile) - row * row_bytes);
}

void run(const char* op, const PairCall& call, const Results& results) {
  const Tensor& input = call.input;
  const int64_t lead = input.dim() - 1;
  const bool scales = call.scale != 1, has_output = results.output.defined();
  // First: a lazy clone gets memory of its own by this.
  void *const sum = data_of(results.sum), *const output = data_of(results.output);
  const Placed x = place(input, lead), residual = place(call.residual, lead);
  const auto input_weight = dense(call.input_weight), weight = dense(call.weight);
  RmsNormForward norm{};
  set_norm(norm, x, lead, *input_weight, call.options());
  norm.y_dtype = *as_dtype(call.norm_type());
  norm.y_rows = dense_rows(norm.cols);
  norm.rstd = data_of(results.input_rstd);
  RmsNormForward add{};
  const Placed total{c10::MaybeOwned<Tensor>::borrowed(results.sum), results.sum_rows};
  set_norm(add, total, lead, *weight, call.options());
  add.x = sum;
  add.addends = {nullptr,       residual.tensor->const_data_ptr(),
                 norm.y_dtype,  norm.y_rows,
                 residual.rows, /*unrounded=*/false};
  if (has_output) {
    add.y = output;
    add.y_rows = results.output_rows;
    add.y_dtype = dtype(results.output);
    add.rstd = data_of(results.rstd);
  }
  if (!input.is_cpu()) {
    const RmsNormSandwich both{norm, add, call.scale};
    return run_cuda(op, input,
                    [&](void* stream) { return cuda::rms_norm_sandwich_forward(both, stream); });
  }

  cpu::isa();  // throws outside the parallel region if the environment asks for what is not there
  // The sum alone: its norm is left where what was added lay.
  RmsNormForward add_alone = add;
  add_alone.weight = nullptr;
  add_alone.y = add_alone.rstd = nullptr;
  add_alone.y_dtype = norm.y_dtype;
  add_alone.y_rows = norm.y_rows;
  if (has_output) {
    add.stream = results.are_new && cpu::writes_past_caches(results.output.nbytes(), true);
    add.fresh = results.are_new;
  }
  // The norm of the sum alone: what is added to it is -0, in all rows the same.
  RmsNormForward norm_alone = add;
  norm_alone.addends.residual = sum;
  norm_alone.addends.residual_rows = add.x_rows;
  norm_alone.addends.input_rows = Rows{1, {1}, {0}};
  const int64_t row_bytes = norm.cols * size_of(norm.y_dtype);
  const int64_t tile_rows = std::clamp<int64_t>(tile_bytes() / row_bytes, 1, norm.rows);
  const int64_t bytes_of_tile = whole_lines(tile_rows * row_bytes);
  const int64_t item_bytes = 2 * norm.cols * (size_of(norm.x_dtype) + size_of(add.x_dtype));
  const int64_t workspace_bytes = bytes_of_tile + (scales ? row_bytes : 0);
  in_parts(norm.rows, item_bytes, workspace_bytes, input,
           [&](int64_t part, int64_t parts, void* workspace) {
             void* const nothing = static_cast<char*>(workspace) + bytes_of_tile;
             if (scales) {
               with_type(norm.y_dtype, [&](auto zero) {
                 using T = decltype(zero);
                 std::fill_n(static_cast<T*>(nothing), norm.cols, static_cast<T>(-0.0F));
               });
             }
             const int64_t end = (part + 1) * norm.rows / parts;
             for (int64_t row = part * norm.rows / parts, next; row < end; row = next) {
               next = std::min(row + tile_rows, end);
               void* const tile = row_0_of(workspace, row, row_bytes);
               RmsNormForward step = norm;
               step.y = tile;
               cpu::rms_norm_forward(step, row, next);
               step = has_output && !scales ? add : add_alone;
               step.addends.input = tile;
               if (!step.y) step.y = tile;
               cpu::rms_norm_forward(step, row, next);
               if (!scales) continue;
               scale_rows(add, call.scale, row, next);
               step = norm_alone;
               step.addends.input = nothing;
               cpu::rms_norm_forward(step, row, next);
             }
           });
}

// ------------------------------------------------------------------------------------- forward

// As of the pair, without the second norm.
PairCall without_output(const Call& call) {
  const auto& [eps, weight_offset, cast_before_weight] = call.options;
  static const OptionalTensor none;
  return {call.input, call.residual, call.weight,   none,
          eps,        /*scale=*/1,   weight_offset, cast_before_weight};
}

// Of no elements, a mean over nothing.
void fill(const Tensor& rstd) {
  if (rstd.defined()) rstd.fill_(std::numeric_limits<double>::quiet_NaN());
}

template <bool want_rstd>
Results new_results(const char* op, const PairCall& call, bool has_output) {
  const Tensor& input = call.input;
  const SymIntArrayRef sizes = input.sym_sizes(), rows = sizes.slice(0, input.dim() - 1);
  Results r{};
  r.are_new = true;
  if (has_output) r.output = allocate(sizes, input, call.output_type_of_pair());
  r.sum = allocate(sizes, input, call.residual.scalar_type());
  if (want_rstd) r.input_rstd = allocate(rows, input, rstd_type(input));
  if (want_rstd && has_output) r.rstd = allocate(rows, input, rstd_type(r.sum));
  if (input.is_meta()) return r;
  if (input.numel() == 0) {
    fill(r.input_rstd);
    fill(r.rstd);
    return r;
  }
  r.output_rows = r.sum_rows = dense_rows(input.size(-1));
  run(op, call, r);
  return r;
}

template <bool want_rstd>
std::tuple<Tensor, Tensor> rms_norm_add_forward(const Call& call) {
  check(kAdd, call);
  Results r = new_results<want_rstd>(kAdd, without_output(call), /*has_output=*/false);
  return {std::move(r.sum), std::move(r.input_rstd)};
}
Tensor rms_norm_add(const Call& call) { return std::get<0>(rms_norm_add_forward<false>(call)); }

void rms_norm_add_out(const OutCall& out_call) {
  const auto& [call, out] = out_call;
  const auto& [input, residual, weight, options] = call;
  check(kAdd, call);
  check_tensor(kAdd, "out", out, input.sym_sizes(), residual.scalar_type());
  if (input.is_meta() || input.numel() == 0) return;
  const int64_t lead = input.dim() - 1, cols = input.size(-1);
  check_written_rows(kAdd, "out", out, lead, cols, "input", input);
  const Rows rows = check_written_rows(kAdd, "out", out, lead, cols, "residual", residual);
  if (weight) check_apart(kAdd, "out", out, "weight", *weight);
  Results results{};
  results.sum = out;
  results.sum_rows = rows;
  run(kAdd, without_output(call), results);
}

template <bool want_rstd>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_add_rms_norm_forward(const PairCall& call) {
  check(kPair, call);
  Results r = new_results<want_rstd>(kPair, call, /*has_output=*/true);
  return {std::move(r.output), std::move(r.sum), std::move(r.input_rstd), std::move(r.rstd)};
}
std::tuple<Tensor, Tensor> rms_norm_add_rms_norm(const PairCall& call) {
  auto [y, sum, input_rstd, rstd] = rms_norm_add_rms_norm_forward<false>(call);
  return {std::move(y), std::move(sum)};
}

// The sum goes to residual_out, its norm to y; both may be what they are made of.
void write(const char* op, const PairCall& call, const Tensor& y, const char* y_name,
           const Tensor& residual_out, const char* residual_name) {
  const Tensor &input = call.input, &residual = call.residual;
  const int64_t lead = input.dim() - 1, cols = input.size(lead);
  Results results{};
  results.output = y;
  results.sum = residual_out;
  results.output_rows = check_written_rows(op, y_name, y, lead, cols, "input", input);
  results.sum_rows =
      check_written_rows(op, residual_name, residual_out, lead, cols, "residual", residual);
  const std::pair<const char*, const OptionalTensor&> weights[] = {
      {"input_weight", call.input_weight}, {"weight", call.weight}};
  for (const auto& [name, weight] : weights) {
    if (!weight) continue;
    check_apart(op, y_name, y, name, *weight);
    check_apart(op, residual_name, residual_out, name, *weight);
  }
  check_apart(op, y_name, y, residual_name, residual_out, lead, cols);
  check_apart(op, y_name, y, "residual", residual, lead, cols);
  check_apart(op, residual_name, residual_out, "input", input, lead, cols);
  run(op, call, results);
}

void rms_norm_add_rms_norm_(const PairCall& call) {
  constexpr const char* op = "rms_norm_add_rms_norm_";
  check(op, call);
  TORCH_CHECK(call.output_type_of_pair() == call.input.scalar_type(), op, ": the result has dtype ",
              call.output_type_of_pair(), " and cannot take the place of input, which has ",
              call.input.scalar_type(), "; use rms_norm_add_rms_norm");
  if (call.input.is_meta() || call.input.numel() == 0) return;
  write(op, call, call.input, "input", call.residual, "residual");
}

void rms_norm_add_rms_norm_out(const PairOutCall& out_call) {
  const auto& [call, out, residual_out] = out_call;
  const Tensor& input = call.input;
  check(kPair, call);
  check_tensor(kPair, "out", out, input.sym_sizes(), call.output_type_of_pair());
  check_tensor(kPair, "residual_out", residual_out, input.sym_sizes(), call.residual.scalar_type());
  if (input.is_meta() || input.numel() == 0) return;
  write(kPair, call, out, "out", residual_out, "residual_out");
}

// ------------------------------------------------------------------------------------- formula

Tensor sum_of(const Tensor& norm, const Tensor& residual) {
  const at::ScalarType compute = compute_type(norm, std::nullopt);
  return (norm.to(compute) + residual.to(compute)).to(residual.scalar_type());
}

template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_add_forward_formula(const Call& call) {
  const auto& [input, residual, weight, options] = call;
  check(kAdd, call);
  const SymIntArrayRef last = input.sym_sizes().slice(input.dim() - 1);
  const Formula norm(kAdd, rescaling, input, last, weight, options);
  return {sum_of(norm.output(), residual), norm.rstd()};
}
template <Rescaling rescaling>
Tensor rms_norm_add_formula(const Call& call) {
  return std::get<0>(rms_norm_add_forward_formula<rescaling>(call));
}

template <Rescaling rescaling>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_add_rms_norm_forward_formula(
    const PairCall& call) {
  check(kPair, call);
  const Tensor& input = call.input;
  const NormOptions options = call.options();
  const SymIntArrayRef last = input.sym_sizes().slice(input.dim() - 1);
  const Formula norm(kPair, rescaling, input, last, call.input_weight, options);
  Tensor sum = sum_of(norm.output(), call.residual);
  if (call.scale != 1) sum = sum * call.scale;
  const Formula of_sum(kPair, rescaling, sum, last, call.weight, options);
  return {of_sum.output().to(call.output_type_of_pair()), sum, norm.rstd(), of_sum.rstd()};
}
template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_add_rms_norm_formula(const PairCall& call) {
  auto [output, sum, input_rstd, rstd] = rms_norm_add_rms_norm_forward_formula<rescaling>(call);
  return {std::move(output), std::move(sum)};
}

// ------------------------------------------------------------------------------------ recorded

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// (dx, dweight), the last dimension normalized. Nothing is computed that is not wanted.
std::tuple<Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x,
                                         const OptionalTensor& weight, const Tensor& rstd,
                                         const NormOptions& options, std::array<bool, 2> mask,
                                         const Tensor& dsum = Tensor()) {
  return ops::rms_norm_backward::call(dy, x, x.sym_sizes().slice(x.dim() - 1), weight, rstd,
                                      options.eps, mask, optional(dsum), options.weight_offset,
                                      options.cast_before_weight);
}

struct RecordAdd : torch::autograd::Function<RecordAdd> {
  static constexpr bool is_traceable = true;  // as in rms_norm.cpp

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                        const OptionalTensor& weight, const NormOptions& options, Tensor* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output;
    std::tie(output, *rstd) = ops::rms_norm_add_forward::call(
        input, residual, weight, options.eps, options.weight_offset, options.cast_before_weight);
    ctx->save_for_backward({input, weight.value_or(Tensor()), *rstd});
    save(ctx, options);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = optional(saved[1]);
    auto [dx, dweight] =
        norm_backward(grads[0], saved[0], weight, saved[2], saved_options(ctx),
                      {ctx->needs_input_grad(0), weight && ctx->needs_input_grad(2)});
    const Tensor dresidual = ctx->needs_input_grad(1) ? grads[0] : Tensor();
    return {dx, dresidual, dweight, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> record_add_forward(const Call& call) {
  Tensor rstd,
      output = RecordAdd::apply(call.input, call.residual, call.weight, call.options, &rstd);
  return {std::move(output), std::move(rstd)};
}
Tensor record_add(const Call& call) { return std::get<0>(record_add_forward(call)); }

struct RecordPair : torch::autograd::Function<RecordPair> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& residual,
                               const OptionalTensor& input_weight, const OptionalTensor& weight,
                               const PairCall* call, std::array<Tensor, 2>* rstds) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output, sum;
    auto& [input_rstd, rstd] = *rstds;
    std::tie(output, sum, input_rstd, rstd) = ops::rms_norm_add_rms_norm_forward::call(
        input, residual, input_weight, weight, call->eps, call->scale, call->weight_offset,
        call->cast_before_weight);
    ctx->save_for_backward(
        {input, sum, input_weight.value_or(Tensor()), weight.value_or(Tensor()), input_rstd, rstd});
    ctx->set_materialize_grads(false);
    const bool sum_grad = input.requires_grad() || residual.requires_grad() ||
                          (input_weight && input_weight->requires_grad());
    if (!sum_grad) ctx->mark_non_differentiable({sum});
    save(ctx, call->options());
    if (call->scale != 1) ctx->saved_data["scale"] = call->scale;
    return {output, sum};
  }

  // The gradient that flows into the sum is added in the pass that forms that of its norm.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &sum = saved[1];
    const OptionalTensor input_weight = optional(saved[2]), weight = optional(saved[3]);
    const NormOptions options = saved_options(ctx);
    const bool wants_dx = ctx->needs_input_grad(0), wants_dresidual = ctx->needs_input_grad(1);
    const bool wants_dinput_weight = input_weight && ctx->needs_input_grad(2);
    const size_t of_weight = 2 + input_weight.has_value();  // absent tensors are not counted
    const bool wants_dweight = weight && ctx->needs_input_grad(of_weight);
    const bool wants_norm = wants_dx || wants_dinput_weight;
    Tensor dsum = grads[1], dx, dinput_weight, dweight;
    if (grads[0].defined()) {
      std::tie(dsum, dweight) =
          norm_backward(grads[0], sum, weight, saved[5], options,
                        {wants_norm || wants_dresidual, wants_dweight}, grads[1]);
    }
    if (dsum.defined()) {
      const auto scale = ctx->saved_data.find("scale");
      if (scale != ctx->saved_data.end()) dsum = dsum * scale->second.toDouble();
      if (wants_norm) {
        std::tie(dx, dinput_weight) = norm_backward(dsum, input, input_weight, saved[4], options,
                                                    {wants_dx, wants_dinput_weight});
      }
    }
    return {dx, wants_dresidual ? dsum : Tensor(), dinput_weight, dweight, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> record_pair_forward(const PairCall& call) {
  std::array<Tensor, 2> rstds;
  const variable_list results =
      RecordPair::apply(call.input, call.residual, call.input_weight, call.weight, &call, &rstds);
  return {results[0], results[1], rstds[0], rstds[1]};
}
std::tuple<Tensor, Tensor> record_pair(const PairCall& call) {
  auto [output, sum, input_rstd, rstd] = record_pair_forward(call);
  return {std::move(output), std::move(sum)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) return;
  constexpr auto kPlain = Rescaling::kPlain, kRescaled = Rescaling::kRescaled;
  const std::string options = "float weight_offset=0.0, bool cast_before_weight=False";
  const std::string arguments =
      "Tensor input, Tensor residual, Tensor? weight=None, float? eps=None, *, " + options;
  ops::rms_norm_add::define<rms_norm_add, rms_norm_add_formula<kRescaled>, record_add,
                            rms_norm_add_formula<kPlain>>(m, arguments, "Tensor");
  ops::rms_norm_add_forward::define<rms_norm_add_forward<true>,
                                    rms_norm_add_forward_formula<kRescaled>, record_add_forward,
                                    rms_norm_add_forward_formula<kPlain>>(
      m, arguments, "(Tensor output, Tensor rstd)");
  ops::rms_norm_add_out::define<rms_norm_add_out>(m, arguments + ", Tensor(a!) out", "()");
  const std::string of_pair =
      "Tensor? input_weight, Tensor? weight, float? eps=None, *, float scale=1.0, " + options;
  const std::string pair = "Tensor input, Tensor residual, " + of_pair;
  ops::rms_norm_add_rms_norm::define<rms_norm_add_rms_norm,
                                     rms_norm_add_rms_norm_formula<kRescaled>, record_pair,
                                     rms_norm_add_rms_norm_formula<kPlain>>(
      m, pair, "(Tensor output, Tensor residual_out)");
  ops::rms_norm_add_rms_norm_forward::define<
      rms_norm_add_rms_norm_forward<true>, rms_norm_add_rms_norm_forward_formula<kRescaled>,
      record_pair_forward, rms_norm_add_rms_norm_forward_formula<kPlain>>(
      m, pair, "(Tensor output, Tensor residual_out, Tensor input_rstd, Tensor rstd)");
  ops::rms_norm_add_rms_norm_::define<rms_norm_add_rms_norm_>(
      m, "Tensor(a!) input, Tensor(b!) residual, " + of_pair, "()");
  ops::rms_norm_add_rms_norm_out::define<rms_norm_add_rms_norm_out>(
      m, pair + ", Tensor(a!) out, Tensor(b!) residual_out", "()");
}

}  // namespace rmsnorm

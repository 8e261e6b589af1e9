// The norm in 8 bits for the matrix product that follows, for inference: rms_norm_quant,
// fused_add_rms_norm_quant, rms_norm_gated_quant, and their overloads out.
#include <ATen/ops/empty.h>

#include <limits>

#include "checks.h"
#include "gated.h"
#include "launch.h"
#include "ops.h"

namespace rmsnorm {
namespace {

// What follows input and residual in the schemas.
struct Arguments {
  const OptionalTensor& weight;
  const OptionalTensor& scale;  // static: one for all; nullopt: dynamic, found and returned
  std::optional<double> eps;
  at::ScalarType dtype;
  std::optional<int64_t> block;  // columns that share a dynamic scale; nullopt: a row
  std::optional<double> scale_ub;
  bool column_major;  // dynamic scales of blocks
  bool keep_norm;
};
struct Call {
  const Tensor& input;
  Arguments arguments;
  double weight_offset;
  bool cast_before_weight;

  NormOptions norm() const { return {arguments.eps, weight_offset, cast_before_weight}; }
};
struct FusedCall {
  const Tensor& input;
  const Tensor& residual;
  Arguments arguments;
  double weight_offset;
  bool cast_before_weight;
  bool round_sum;

  NormOptions norm() const { return {arguments.eps, weight_offset, cast_before_weight}; }
};
struct GatedCall {
  const Tensor& input;
  const OptionalTensor& gate;
  Arguments arguments;
  gated::Options options;

  gated::Call gated() const { return {input, gate, arguments.weight, arguments.eps, options}; }
};

// A result that is not asked for is a tensor without elements: a compiler that writes into buffers
// of its own can only do so if each result is a tensor.
struct Results {
  Tensor output, scale, residual_out, norm;
};
struct OutCall {
  Call quant;
  const Tensor &out, &scale_out, &norm_out;
};
struct FusedOutCall {
  FusedCall quant;
  const Tensor &out, &scale_out, &residual_out, &norm_out;
};
struct GatedOutCall {
  GatedCall quant;
  const Tensor &out, &scale_out, &norm_out;
};

// One body for all six ops.
class Quantization {
 public:
  explicit Quantization(const Call& call)
      : Quantization("rms_norm_quant", call.input, call.arguments, call.norm()) {}
  explicit Quantization(const FusedCall& call)
      : Quantization("fused_add_rms_norm_quant", call.input, call.arguments, call.norm(),
                     &call.residual, call.round_sum) {}
  explicit Quantization(const GatedCall& call)
      : Quantization("rms_norm_gated_quant", call.input, call.arguments, call.gated().norm(),
                     nullptr, true, call.gated()) {}

  Results operator()() const {
    Results results;
    results.output = allocate(sizes_, input_, arguments_.dtype);
    results.scale = allocate_scale();
    if (residual_) results.residual_out = allocate(sizes_, input_, residual_->scalar_type());
    const c10::SymInt nothing[] = {0};
    results.norm =
        allocate(arguments_.keep_norm ? sizes_ : SymIntArrayRef(nothing), input_, norm_type_);
    write_to(results);
    return results;
  }

  // Into tensors that the caller owns.
  void operator()(const Results& results) const {
    check(results);
    write_to(results);
  }

 private:
  // residual: nullptr if none is added. round_sum: then also before it is normalized.
  Quantization(const char* op, const Tensor& input, const Arguments& arguments,
               const NormOptions& norm, const Tensor* residual = nullptr, bool round_sum = true,
               std::optional<gated::Call> gated = std::nullopt)
      : op_(op),
        input_(input),
        residual_(residual),
        gated_(std::move(gated)),
        arguments_(arguments),
        norm_(norm),
        round_sum_(round_sum),
        lead_(input.dim() - 1),
        sizes_(input.sym_sizes()) {
    check();
    scale_shape_.assign(sizes_.begin(), sizes_.end());
    const auto& block = arguments_.block;
    scale_shape_[lead_] = block ? sizes_[lead_] / *block : c10::SymInt(1);
    if (arguments_.scale) scale_shape_ = {0};
    norm_type_ = gated_ ? gated_->output_type() : output_type(input_, arguments_.weight, norm_);
  }

  void check() const {
    const auto& [weight, scale, eps, dtype, block, scale_ub, column_major, keep_norm] = arguments_;
    if (residual_) check_residual(op_, input_, *residual_);
    gated_ ? gated::check(op_, *gated_)
           : static_cast<void>(check_last_dim(op_, input_, weight, norm_));
    TORCH_CHECK_VALUE(as_qtype(dtype), op_,
                      ": expected dtype to be float8_e4m3fn, float8_e5m2 or int8, but got ", dtype);
    check_not_double(input_);
    if (weight) check_not_double(*weight);
    if (gated_ && gated_->gate) check_not_double(*gated_->gate);
    if (scale) {
      TORCH_CHECK(scale->scalar_type() == at::kFloat && scale->sym_numel() == 1, op_,
                  ": expected scale to be one float32, but got ", scale->scalar_type(),
                  " of shape ", scale->sym_sizes());
      TORCH_CHECK_VALUE(!block && !scale_ub, op_,
                        ": block and scale_ub are for scales that are found; expected neither "
                        "beside a given scale, but got ",
                        block ? "block" : "scale_ub");
    }
    if (block) {
      TORCH_CHECK_VALUE(*block == 64 || *block == 128, op_,
                        ": expected block to be 64 or 128, but got ", *block);
      const c10::SymInt& cols = sizes_[lead_];
      TORCH_SYM_CHECK((cols % *block).sym_eq(0), op_,
                      ": expected a last dimension that is a multiple of block=", *block,
                      ", but got ", cols);
    }
    TORCH_CHECK_VALUE(!scale_ub || *scale_ub > 0, op_,
                      ": expected scale_ub to be positive, but got ", *scale_ub);
    TORCH_CHECK_VALUE(!column_major || block, op_,
                      ": column-major scales are those of blocks; expected block to be given");
  }

  void check_not_double(const Tensor& t) const {
    if (t.scalar_type() != at::kDouble) return;
    refuse_dtype(op_, t,
                 std::string("expected input") + (gated_ ? ", gate" : "") +
                     " and weight to be float32, float16 or bfloat16");
  }

  Tensor allocate_scale() const {
    if (!arguments_.column_major) return allocate(scale_shape_, input_, at::kFloat);
    c10::SymDimVector shape{scale_shape_.back()};
    shape.append(scale_shape_.begin(), scale_shape_.end() - 1);
    return allocate(shape, input_, at::kFloat).movedim(0, -1);
  }

  // Names of the tensors that are written, each with what it may not share memory with.
  void check(const Results& results) const {
    const auto& [output, scale, residual_out, norm] = results;
    check_dense("out", output, sizes_, arguments_.dtype);
    check_dense("scale_out", scale, scale_shape_, at::kFloat, arguments_.column_major);
    if (residual_) check_dense("residual_out", residual_out, sizes_, residual_->scalar_type());
    if (arguments_.keep_norm) {
      check_dense("norm_out", norm, sizes_, norm_type_);
    } else {
      const c10::SymInt nothing[] = {0};
      check_tensor(op_, "norm_out", norm, nothing);
    }
    if (input_.is_meta()) return;
    const std::pair<const char*, const Tensor*> written[] = {{"out", &output},
                                                             {"scale_out", &scale},
                                                             {"residual_out", &residual_out},
                                                             {"norm_out", &norm}};
    for (const auto& [name, t] : written) {
      if (!t->defined()) continue;
      if (t != &residual_out) check_apart(op_, name, *t, "input", input_);
      if (residual_ && t != &residual_out) check_apart(op_, name, *t, "residual", *residual_);
      if (gated_ && gated_->gate) check_apart(op_, name, *t, "gate", *gated_->gate);
      if (arguments_.weight) check_apart(op_, name, *t, "weight", *arguments_.weight);
      if (arguments_.scale) check_apart(op_, name, *t, "scale", *arguments_.scale);
      for (const auto& [other_name, other] : written) {
        if (other < t && other->defined()) check_apart(op_, name, *t, other_name, *other);
      }
    }
    if (residual_ && residual_out.numel() > 0) {
      check_written_rows(op_, "residual_out", residual_out, lead_, input_.size(lead_), "residual",
                         *residual_);
      check_apart(op_, "residual_out", residual_out, "input", input_);
    }
  }

  void check_dense(const char* name, const Tensor& t, SymIntArrayRef shape, at::ScalarType type,
                   bool column_major = false) const {
    check_tensor(op_, name, t, shape, type);
    if (t.is_meta()) return;
    TORCH_CHECK((column_major ? t.movedim(-1, 0) : t).is_contiguous(), op_, ": expected ", name,
                column_major ? " to be column-major" : " to be contiguous", ", but got strides ",
                t.strides());
  }

  void write_to(const Results& results) const {
    if (input_.is_meta()) return;
    const QType type = *as_qtype(arguments_.dtype);
    const float least_scale = type == QType::kInt8 ? std::numeric_limits<float>::epsilon()
                                                   : 1.0f / (max_value(type) * 512.0f);
    if (input_.numel() == 0) {
      if (results.scale.numel() > 0) results.scale.fill_(least_scale);
      return;
    }
    const auto& [weight, scale, eps, dtype, block, scale_ub, column_major, keep_norm] = arguments_;
    const int64_t cols = input_.size(lead_), rows = input_.numel() / cols;
    const int64_t blocks = block ? cols / *block : 1;
    Quant q{};
    q.data = results.output.mutable_data_ptr();
    q.dtype = type;
    q.least = least_scale;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double bound = scale_ub.value_or(kInfinity);
    q.bound = static_cast<float>(bound > std::numeric_limits<float>::max() ? kInfinity : bound);
    q.block = scale ? 0 : block.value_or(cols);
    q.row_stride = column_major ? 1 : blocks;
    q.block_stride = column_major ? rows : 1;
    // The kernels only read a static scale.
    q.scale = scale ? const_cast<float*>(scale->const_data_ptr<float>())
                    : results.scale.mutable_data_ptr<float>();
    if (gated_) return run_gated(q, results.norm);
    ForwardLaunch launch(op_, residual_ ? results.residual_out : input_, lead_, weight, norm_);
    if (residual_) launch.add(input_, *residual_, round_sum_);
    launch.quantize(q, norm_type_);
    if (keep_norm) launch.write_to(results.norm, dense_rows(cols), /*stream=*/false);
    launch.run();
  }

  void run_gated(const Quant& q, const Tensor& norm) const {
    RmsNormForward p{};
    p.quant = q;
    p.y = arguments_.keep_norm ? norm.mutable_data_ptr() : nullptr;
    p.y_rows = dense_rows(input_.size(lead_));
    p.y_dtype = *as_dtype(norm_type_);
    gated::run(op_, *gated_, p);
  }

  const char* const op_;
  const Tensor& input_;
  const Tensor* const residual_;
  const std::optional<gated::Call> gated_;
  const Arguments& arguments_;
  const NormOptions norm_;
  const bool round_sum_;
  const int64_t lead_;
  const SymIntArrayRef sizes_;
  c10::SymDimVector scale_shape_;
  at::ScalarType norm_type_;
};

template <class Call>
std::tuple<Tensor, Tensor, Tensor> quant(const Call& call) {
  auto [output, scale, residual_out, norm] = Quantization(call)();
  return {std::move(output), std::move(scale), std::move(norm)};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_add_rms_norm_quant(const FusedCall& call) {
  auto [output, scale, residual_out, norm] = Quantization(call)();
  return {std::move(output), std::move(scale), std::move(residual_out), std::move(norm)};
}
template <class OutCall>
void quant_out(const OutCall& call) {
  Quantization(call.quant)({call.out, call.scale_out, Tensor(), call.norm_out});
}
void fused_add_rms_norm_quant_out(const FusedOutCall& call) {
  Quantization(call.quant)({call.out, call.scale_out, call.residual_out, call.norm_out});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) return;
  const std::string arguments =
      "Tensor? weight=None, Tensor? scale=None, float? eps=None, *, ScalarType dtype, "
      "int? block=None, float? scale_ub=None, bool column_major=False, bool keep_norm=False, ";
  const std::string options = "float weight_offset=0.0, bool cast_before_weight=False";
  const std::string norm = "Tensor input, " + arguments + options;
  const std::string fused =
      "Tensor input, Tensor residual, " + arguments + options + ", bool round_sum=True";
  const std::string gated = "Tensor input, Tensor? gate, " + arguments +
                            "str activation=\"silu\", bool norm_before_gate=True, "
                            "int? group_size=None, " +
                            options;
  const char* const results = "(Tensor output, Tensor scale, Tensor norm)";
  const std::string out = ", Tensor(a!) out, Tensor(b!) scale_out, Tensor(c!) norm_out";
  ops::rms_norm_quant::define<quant<Call>>(m, norm, results);
  ops::rms_norm_quant_out::define<quant_out<OutCall>>(m, norm + out, "()");
  ops::rms_norm_gated_quant::define<quant<GatedCall>>(m, gated, results);
  ops::rms_norm_gated_quant_out::define<quant_out<GatedOutCall>>(m, gated + out, "()");
  ops::fused_add_rms_norm_quant::define<fused_add_rms_norm_quant>(
      m, fused, "(Tensor output, Tensor scale, Tensor residual_out, Tensor norm)");
  ops::fused_add_rms_norm_quant_out::define<fused_add_rms_norm_quant_out>(
      m,
      fused +
          ", Tensor(a!) out, Tensor(b!) scale_out, Tensor(c!) residual_out, Tensor(d!) norm_out",
      "()");
}

}  // namespace rmsnorm

// A norm with a gate, or of groups of columns, as its ops are called: gated.cpp, and quant.cpp,
// whose codes are those of its result.
#pragma once
#include <string_view>

#include "checks.h"
#include "op.h"

namespace rmsnorm::gated {

struct Options {
  std::string_view activation;
  bool norm_before_gate;
  std::optional<int64_t> group_size;
  double weight_offset;
  bool cast_before_weight;
};
struct Call {
  const Tensor& input;
  const OptionalTensor& gate;
  const OptionalTensor& weight;
  std::optional<double> eps;
  Options options;

  NormOptions norm() const { return {eps, options.weight_offset, options.cast_before_weight}; }
  int64_t lead() const { return input.dim() - 1; }
  bool gate_is_first() const { return gate && !options.norm_before_gate; }
  at::ScalarType compute_type() const {
    const bool fp64 = gate && gate->scalar_type() == at::kDouble;
    return fp64 ? at::kDouble : rmsnorm::compute_type(input, weight);
  }
  at::ScalarType product_type() const { return rmsnorm::output_type(input, weight, norm()); }
  at::ScalarType output_type() const {
    return gate && options.norm_before_gate ? input.scalar_type() : product_type();
  }
  at::ScalarType rstd_type() const {
    return gate_is_first() ? compute_type() : rmsnorm::rstd_type(input);
  }
  // One of each row, or [groups, *rows].
  c10::SymDimVector rstd_shape() const {
    c10::SymDimVector shape(input.sym_sizes().slice(0, lead()));
    if (options.group_size) {
      shape.insert(shape.begin(), input.sym_size(-1) / *options.group_size);
    }
    return shape;
  }
};

void check(const char* op, const Call& call);

// Of checked arguments that have elements. results: all that is written, and how; its quant too.
void run(const char* op, const Call& call, const RmsNormForward& results);

}  // namespace rmsnorm::gated

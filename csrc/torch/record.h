// What an autograd::Function of this package keeps of its options. (Its tensors: those that may be
// absent come last, since needs_input_grad() counts the ones that are there.)
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include "options.h"

namespace rmsnorm {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An entry of saved_data costs an allocation or two: only what differs from the usual is kept.
inline void save(AutogradContext* ctx, const NormOptions& options) {
  auto& data = ctx->saved_data;
  if (options.eps) data["eps"] = *options.eps;
  if (options.weight_offset != 0) data["weight_offset"] = options.weight_offset;
  if (options.cast_before_weight) data["cast_before_weight"] = true;
}

inline NormOptions saved_options(AutogradContext* ctx) {
  const auto& data = ctx->saved_data;
  NormOptions options{};
  if (const auto eps = data.find("eps"); eps != data.end()) options.eps = eps->second.toDouble();
  if (const auto offset = data.find("weight_offset"); offset != data.end()) {
    options.weight_offset = offset->second.toDouble();
  }
  options.cast_before_weight = data.count("cast_before_weight") > 0;
  return options;
}

}  // namespace rmsnorm

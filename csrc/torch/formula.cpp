#include "formula.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "checks.h"

namespace rmsnorm {
namespace {

// For rows whose squares leave the range of the type: about what brings their largest element to 1.
// All others keep 1, and with it their bits. It is a constant to every derivative.
Tensor row_factor(const Tensor& x, at::IntArrayRef dims, double eps) {
  const bool fp64 = x.scalar_type() == at::kDouble;
  const double edge = fp64 ? 1e150 : 1e15, range = fp64 ? 1e300 : 1e30;
  const double finite = 0.5 * std::sqrt((fp64 ? 1e307 : 1e38) / std::max(eps, 1e-320));
  const Tensor largest = at::amax(x.detach().abs(), dims, /*keepdim=*/true);
  const Tensor in_range = largest.gt(1 / edge).logical_and(largest.lt(edge));
  const Tensor keep = in_range.logical_or(at::isfinite(largest).logical_not());
  // Bounded, so that eps * factor^2 is finite.
  const Tensor factor = at::reciprocal(largest).clamp(1 / range, std::min(range, finite));
  return at::where(keep, 1.0, factor).to(x.scalar_type());
}

}  // namespace

Formula::Formula(const char* name, Rescaling rescaling, const Tensor& input,
                 SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                 const NormOptions& options, std::optional<at::ScalarType> cast_type)
    : Formula(name, rescaling, (check_norm(name, input, normalized_shape, weight, options), input),
              static_cast<int64_t>(normalized_shape.size()),
              static_cast<int64_t>(normalized_shape.size()), weight, options, cast_type) {}

Formula::Formula(const char* name, Rescaling rescaling, const Tensor& input,
                 int64_t normalized_dims, int64_t weight_dims, const OptionalTensor& weight,
                 const NormOptions& options, std::optional<at::ScalarType> cast_type)
    : name_(name),
      input_(input),
      weight_(weight),
      options_(options),
      compute_(compute_type(input, weight)),
      normalized_dims_(normalized_dims) {
  lead_dims_.resize(input.dim() - weight_dims);
  for (size_t i = 0; i < normalized_dims_.size(); ++i) {
    normalized_dims_[i] = -1 - static_cast<int64_t>(i);
  }
  std::iota(lead_dims_.begin(), lead_dims_.end(), 0);
  x_ = input.to(compute_);
  const double eps = eps_or_default(options.eps, input);
  const auto mean_of_squares = [&] {
    return at::mean(x_ * x_, normalized_dims_, /*keepdim=*/true);
  };
  const SymIntArrayRef normalized = input.sym_sizes().slice(input.dim() - normalized_dims);
  const bool has_columns = std::none_of(normalized.begin(), normalized.end(),
                                        [](const auto& size) { return size == 0; });
  if (rescaling == Rescaling::kRescaled && has_columns) {
    const Tensor factor = row_factor(x_, normalized_dims_, eps);
    x_ = x_ * factor;
    inverse_rms_ = at::rsqrt(mean_of_squares() + at::square(factor * std::sqrt(eps)));
    rstd_ = inverse_rms_ * factor;
  } else {
    rstd_ = inverse_rms_ = at::rsqrt(mean_of_squares() + eps);
  }
  normalized_ = x_ * inverse_rms_;
  if (options.cast_before_weight && weight)
    normalized_ = normalized_.to(cast_type.value_or(input.scalar_type())).to(compute_);
  if (!weight) return;
  const double offset = options.weight_offset;
  gain_ = weight->to(compute_) + (offset == 0 ? -0.0 : offset);  // -0 + 0 would be 0
}

Tensor Formula::product() const { return gain_.defined() ? normalized_ * gain_ : normalized_; }

Tensor Formula::output() const { return product().to(output_type(input_, weight_, options_)); }

Tensor Formula::rstd() const {
  Tensor flat = rstd_;
  for (size_t i = 0; i < normalized_dims_.size(); ++i) flat = flat.squeeze(-1);
  return flat.to(rstd_type(input_)).detach();
}

std::tuple<Tensor, Tensor> Formula::backward(const Tensor& grad_output,
                                             std::array<bool, 2> output_mask,
                                             const OptionalTensor& grad_residual) const {
  check_tensor(name_, "grad_output", grad_output, input_.sym_sizes());
  const Tensor dy = grad_output.to(compute_);
  Tensor dx, dweight;
  if (output_mask[0]) {
    const Tensor g = gain_.defined() ? dy * gain_ : dy;
    const Tensor xhat = x_ * inverse_rms_;
    dx = rstd_ * (g - xhat * at::mean(g * xhat, normalized_dims_, /*keepdim=*/true));
    if (grad_residual) dx = dx + grad_residual->to(compute_);
    dx = dx.to(input_.scalar_type());
  }
  if (output_mask[1] && weight_) {
    const Tensor product = dy * normalized_;
    dweight =
        (lead_dims_.empty() ? product : at::sum(product, lead_dims_)).to(weight_->scalar_type());
  }
  return {dx, dweight};
}

}  // namespace rmsnorm

// What every norm is asked beside its tensors, and what follows for its results.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "../rmsnorm.h"

namespace rmsnorm {

struct NormOptions {
  std::optional<double> eps;
  double weight_offset;
  bool cast_before_weight;
};

inline std::optional<DType> as_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}
inline DType dtype(const at::Tensor& t) { return *as_dtype(t.scalar_type()); }

inline std::optional<QType> as_qtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat8_e4m3fn:
      return QType::kFloat8E4M3;
    case at::kFloat8_e5m2:
      return QType::kFloat8E5M2;
    case at::kChar:
      return QType::kInt8;
    default:
      return std::nullopt;
  }
}

// eps=None is the machine epsilon of the type that is computed in, as in
// torch.nn.functional.rms_norm.
inline double eps_or_default(std::optional<double> eps, const at::Tensor& input) {
  if (eps) return *eps;
  return input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                            : std::numeric_limits<float>::epsilon();
}

inline at::ScalarType output_type(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const NormOptions& options) {
  return options.cast_before_weight && weight
             ? c10::promoteTypes(input.scalar_type(), weight->scalar_type())
             : input.scalar_type();
}

inline at::ScalarType rstd_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace rmsnorm

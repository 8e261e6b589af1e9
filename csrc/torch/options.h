// What every norm is asked beside its tensors, and what follows for its results.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>
#include <utility>

#include "../rmsnorm.h"

namespace rmsnorm {

struct NormOptions {
  std::optional<double> eps;
  double weight_offset;
  bool cast_before_weight;
};

// torch's name of a dtype, in the kernels' words; nullopt if they do not know it.
template <class Type, size_t n>
std::optional<Type> in_table(const std::pair<at::ScalarType, Type> (&table)[n],
                             at::ScalarType type) {
  for (const auto& [name, value] : table) {
    if (name == type) return value;
  }
  return std::nullopt;
}
inline std::optional<DType> as_dtype(at::ScalarType type) {
  static constexpr std::pair<at::ScalarType, DType> kTable[] = {{at::kFloat, DType::kFloat32},
                                                                {at::kHalf, DType::kFloat16},
                                                                {at::kBFloat16, DType::kBFloat16},
                                                                {at::kDouble, DType::kFloat64}};
  return in_table(kTable, type);
}
inline DType dtype(const at::Tensor& t) { return *as_dtype(t.scalar_type()); }
inline std::optional<QType> as_qtype(at::ScalarType type) {
  static constexpr std::pair<at::ScalarType, QType> kTable[] = {
      {at::kFloat8_e4m3fn, QType::kFloat8E4M3},
      {at::kFloat8_e5m2, QType::kFloat8E5M2},
      {at::kChar, QType::kInt8}};
  return in_table(kTable, type);
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

// What the kernels compute in.
inline at::ScalarType compute_type(const at::Tensor& input,
                                   const std::optional<at::Tensor>& weight) {
  const bool fp64 =
      input.scalar_type() == at::kDouble || (weight && weight->scalar_type() == at::kDouble);
  return fp64 ? at::kDouble : at::kFloat;
}

inline at::ScalarType rstd_type(const at::Tensor& input) {
  return compute_type(input, std::nullopt);
}

}  // namespace rmsnorm

// Every op by its C++ type, which is that of its schema. rms_norm.cpp, fused_add.cpp and quant.cpp
// define them. Whoever calls ops::rms_norm::call(...) goes through the dispatcher.
#pragma once
#include "op.h"

namespace rmsnorm::ops {

using Eps = std::optional<double>;
template <int n>
using Tensors = decltype(std::tuple_cat(std::declval<std::array<Tensor, n>>()));  // std::tuple

// (input, normalized_shape, weight, eps, weight_offset, cast_before_weight)
struct rms_norm : Op<rms_norm, Tensor(const Tensor&, SymIntArrayRef, const OptionalTensor&, Eps,
                                      double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::rms_norm";
};
// (output, rstd)
struct rms_norm_forward
    : Op<rms_norm_forward,
         Tensors<2>(const Tensor&, SymIntArrayRef, const OptionalTensor&, Eps, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::rms_norm_forward";
};
// (grad_output, input, normalized_shape, weight, rstd, eps, output_mask, grad_residual,
// weight_offset, cast_before_weight) -> (grad_input, grad_weight)
struct rms_norm_backward
    : Op<rms_norm_backward,
         Tensors<2>(const Tensor&, const Tensor&, SymIntArrayRef, const OptionalTensor&,
                    const Tensor&, Eps, std::array<bool, 2>, const OptionalTensor&, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::rms_norm_backward";
};
struct rms_norm_out : Op<rms_norm_out, void(const Tensor&, SymIntArrayRef, const OptionalTensor&,
                                            Eps, double, bool, const Tensor& out)> {
  static constexpr const char *name = "rmsnorm_cuda::rms_norm", *overload = "out";
};

// (input, residual, weight, eps, weight_offset, cast_before_weight) -> (output, residual_out)
struct fused_add_rms_norm
    : Op<fused_add_rms_norm,
         Tensors<2>(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::fused_add_rms_norm";
};
// (output, residual_out, rstd)
struct fused_add_rms_norm_forward
    : Op<fused_add_rms_norm_forward,
         Tensors<3>(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::fused_add_rms_norm_forward";
};
struct fused_add_rms_norm_
    : Op<fused_add_rms_norm_,
         void(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::fused_add_rms_norm_";
};
struct fused_add_rms_norm_out
    : Op<fused_add_rms_norm_out,
         void(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool,
              const Tensor& out, const Tensor& residual_out)> {
  static constexpr const char *name = "rmsnorm_cuda::fused_add_rms_norm", *overload = "out";
};

// (input, weight, scale, eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset,
// cast_before_weight) -> (output, scale, norm)
struct rms_norm_quant
    : Op<rms_norm_quant, Tensors<3>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                    Eps, at::ScalarType, std::optional<int64_t>,
                                    std::optional<double>, bool, bool, double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::rms_norm_quant";
};
struct rms_norm_quant_out
    : Op<rms_norm_quant_out,
         void(const Tensor&, const OptionalTensor&, const OptionalTensor&, Eps, at::ScalarType,
              std::optional<int64_t>, std::optional<double>, bool, bool, double, bool,
              const Tensor& out, const Tensor& scale_out, const Tensor& norm_out)> {
  static constexpr const char *name = "rmsnorm_cuda::rms_norm_quant", *overload = "out";
};
// the same with residual after input -> (output, scale, residual_out, norm)
struct fused_add_rms_norm_quant
    : Op<fused_add_rms_norm_quant,
         Tensors<4>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, Eps,
                    at::ScalarType, std::optional<int64_t>, std::optional<double>, bool, bool,
                    double, bool)> {
  static constexpr const char* name = "rmsnorm_cuda::fused_add_rms_norm_quant";
};
struct fused_add_rms_norm_quant_out
    : Op<fused_add_rms_norm_quant_out,
         void(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, Eps,
              at::ScalarType, std::optional<int64_t>, std::optional<double>, bool, bool, double,
              bool, const Tensor& out, const Tensor& scale_out, const Tensor& residual_out,
              const Tensor& norm_out)> {
  static constexpr const char *name = "rmsnorm_cuda::fused_add_rms_norm_quant", *overload = "out";
};

}  // namespace rmsnorm::ops

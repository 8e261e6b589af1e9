// Every op by its C++ type, which is that of its schema. rms_norm.cpp, fused_add.cpp, sandwich.cpp,
// gated.cpp, quant.cpp and rope.cpp define them. Whoever calls ops::rms_norm::call(...) goes
// through the dispatcher. An alias of a signature serves every op that has it.
#pragma once
#include "op.h"

namespace rmsnorm::ops {

using Eps = std::optional<double>;
template <int n>
using Tensors = decltype(std::tuple_cat(std::declval<std::array<Tensor, n>>()));  // std::tuple

// (input, normalized_shape, weight, eps, weight_offset, cast_before_weight, ...)
template <class Result, class... Out>
using Norm = Result(const Tensor&, SymIntArrayRef, const OptionalTensor&, Eps, double, bool,
                    Out...);
// (grad_output, input, normalized_shape, weight, rstd, eps, output_mask, grad_residual,
// weight_offset, cast_before_weight)
template <class Result>
using NormBackward = Result(const Tensor&, const Tensor&, SymIntArrayRef, const OptionalTensor&,
                            const Tensor&, Eps, std::array<bool, 2>, const OptionalTensor&, double,
                            bool);
// (input, residual, weight, eps, weight_offset, cast_before_weight, round_sum, ...)
template <class Result, class... Out>
using FusedNorm = Result(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool,
                         bool, Out...);
// (input, residual, weight, eps, weight_offset, cast_before_weight, ...)
template <class Result, class... Out>
using NormAdd = Result(const Tensor&, const Tensor&, const OptionalTensor&, Eps, double, bool,
                       Out...);
// (input, residual, input_weight, weight, eps, scale, weight_offset, cast_before_weight, ...)
template <class Result, class... Out>
using SandwichNorm = Result(const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, Eps, double, double, bool, Out...);
// (input, gate, weight, eps, activation, norm_before_gate, group_size, weight_offset,
// cast_before_weight, ...)
template <class Result, class... Out>
using GatedNorm = Result(const Tensor&, const OptionalTensor&, const OptionalTensor&, Eps,
                         std::string_view, bool, std::optional<int64_t>, double, bool, Out...);
// (grad_output, input, gate, weight, rstd, eps, output_mask, and from activation on the same)
template <class Result>
using GatedNormBackward = Result(const Tensor&, const Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, const Tensor&, Eps, std::array<bool, 3>,
                                 std::string_view, bool, std::optional<int64_t>, double, bool);
// (input, weight, scale, eps, dtype, block, scale_ub, column_major, keep_norm, weight_offset,
// cast_before_weight, ...)
template <class Result, class... Out>
using Quant = Result(const Tensor&, const OptionalTensor&, const OptionalTensor&, Eps,
                     at::ScalarType, std::optional<int64_t>, std::optional<double>, bool, bool,
                     double, bool, Out...);
// the same with residual after input and round_sum after cast_before_weight
template <class Result, class... Out>
using FusedQuant = Result(const Tensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, Eps, at::ScalarType, std::optional<int64_t>,
                          std::optional<double>, bool, bool, double, bool, bool, Out...);
// the same with gate after input, and activation, norm_before_gate and group_size before
// weight_offset
template <class Result, class... Out>
using GatedQuant = Result(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, Eps, at::ScalarType, std::optional<int64_t>,
                          std::optional<double>, bool, bool, std::string_view, bool,
                          std::optional<int64_t>, double, bool, Out...);
// (q, k, q_weight, k_weight, cos, sin, positions, eps, heads_dim, interleaved, sections,
// interleaved_sections, weight_offset, cast_before_weight, round_each_step, ...)
template <class Result, class... Out>
using NormRope = Result(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                        Eps, int64_t, bool, at::OptionalIntArrayRef, bool, double, bool, bool,
                        Out...);
// (grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, positions, q_rstd, k_rstd, eps, output_mask,
// and from heads_dim on the same)
template <class Result>
using NormRopeBackward = Result(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                const Tensor&, Eps, std::array<bool, 4>, int64_t, bool,
                                at::OptionalIntArrayRef, bool, double, bool, bool);

#define RMSNORM_OP(type, op, overload_name, ...)                                        \
  struct type : Op<type, __VA_ARGS__> {                                                 \
    static constexpr const char *name = "rmsnorm_cuda::" op, *overload = overload_name; \
  }
using Out = const Tensor&;
RMSNORM_OP(rms_norm, "rms_norm", "", Norm<Tensor>);
RMSNORM_OP(rms_norm_out, "rms_norm", "out", Norm<void, Out>);
RMSNORM_OP(rms_norm_forward, "rms_norm_forward", "", Norm<Tensors<2>>);            // output, rstd
RMSNORM_OP(rms_norm_backward, "rms_norm_backward", "", NormBackward<Tensors<2>>);  // dx, dweight
// output, residual_out, of the forward also rstd
RMSNORM_OP(fused_add_rms_norm, "fused_add_rms_norm", "", FusedNorm<Tensors<2>>);
RMSNORM_OP(fused_add_rms_norm_, "fused_add_rms_norm_", "", FusedNorm<void>);
RMSNORM_OP(fused_add_rms_norm_out, "fused_add_rms_norm", "out", FusedNorm<void, Out, Out>);
RMSNORM_OP(fused_add_rms_norm_forward, "fused_add_rms_norm_forward", "", FusedNorm<Tensors<3>>);
RMSNORM_OP(rms_norm_add, "rms_norm_add", "", NormAdd<Tensor>);
RMSNORM_OP(rms_norm_add_out, "rms_norm_add", "out", NormAdd<void, Out>);
RMSNORM_OP(rms_norm_add_forward, "rms_norm_add_forward", "", NormAdd<Tensors<2>>);  // sum, rstd
// output, residual_out, of the forward also input_rstd, rstd
RMSNORM_OP(rms_norm_add_rms_norm, "rms_norm_add_rms_norm", "", SandwichNorm<Tensors<2>>);
RMSNORM_OP(rms_norm_add_rms_norm_, "rms_norm_add_rms_norm_", "", SandwichNorm<void>);
RMSNORM_OP(rms_norm_add_rms_norm_out, "rms_norm_add_rms_norm", "out", SandwichNorm<void, Out, Out>);
RMSNORM_OP(rms_norm_add_rms_norm_forward, "rms_norm_add_rms_norm_forward", "",
           SandwichNorm<Tensors<4>>);
RMSNORM_OP(rms_norm_gated, "rms_norm_gated", "", GatedNorm<Tensor>);
RMSNORM_OP(rms_norm_gated_out, "rms_norm_gated", "out", GatedNorm<void, Out>);
RMSNORM_OP(rms_norm_gated_forward, "rms_norm_gated_forward", "",
           GatedNorm<Tensors<2>>);  // output, rstd
RMSNORM_OP(rms_norm_gated_backward, "rms_norm_gated_backward", "",
           GatedNormBackward<Tensors<3>>);  // dx, dgate, dweight
// output, scale, residual_out if there is a residual, norm
RMSNORM_OP(rms_norm_quant, "rms_norm_quant", "", Quant<Tensors<3>>);
RMSNORM_OP(rms_norm_quant_out, "rms_norm_quant", "out", Quant<void, Out, Out, Out>);
RMSNORM_OP(fused_add_rms_norm_quant, "fused_add_rms_norm_quant", "", FusedQuant<Tensors<4>>);
RMSNORM_OP(fused_add_rms_norm_quant_out, "fused_add_rms_norm_quant", "out",
           FusedQuant<void, Out, Out, Out, Out>);
RMSNORM_OP(rms_norm_gated_quant, "rms_norm_gated_quant", "", GatedQuant<Tensors<3>>);
RMSNORM_OP(rms_norm_gated_quant_out, "rms_norm_gated_quant", "out",
           GatedQuant<void, Out, Out, Out>);
// q_out, k_out, of the forward also q_rstd, k_rstd
RMSNORM_OP(rms_norm_rope, "rms_norm_rope", "", NormRope<Tensors<2>>);
RMSNORM_OP(rms_norm_rope_, "rms_norm_rope_", "", NormRope<void>);
RMSNORM_OP(rms_norm_rope_out, "rms_norm_rope", "out", NormRope<void, Out, Out>);
RMSNORM_OP(rms_norm_rope_forward, "rms_norm_rope_forward", "", NormRope<Tensors<4>>);
RMSNORM_OP(rms_norm_rope_backward, "rms_norm_rope_backward", "", NormRopeBackward<Tensors<4>>);

}  // namespace rmsnorm::ops

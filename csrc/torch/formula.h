// The norm in ATen ops, in the type that the kernels compute in: for functorch's transforms,
// forward-mode AD, second derivatives, and compilers that fuse it with its neighbours.
#pragma once
#include <array>
#include <tuple>
#include <vector>

#include "op.h"
#include "options.h"

namespace rmsnorm {

// kRescaled: as the kernels, right for rows whose squares leave the range of that type too.
// kPlain is what a compiler is to fuse.
enum class Rescaling : bool { kPlain, kRescaled };

class Formula {
 public:
  // Checks its arguments as the op `name` does. It refers to the weight, which outlives it.
  // cast_type: of cast_before_weight; nullopt: input's.
  Formula(const char* name, Rescaling rescaling, const Tensor& input,
          SymIntArrayRef normalized_shape, const OptionalTensor& weight, const NormOptions& options,
          std::optional<at::ScalarType> cast_type = std::nullopt);
  // The norm of the last dimension by a weight whose last `weight_dims` dimensions are input's:
  // [D], or of each head its own, [heads, D]. That has been checked. cast_type: what
  // cast_before_weight rounds to, of input where nullopt.
  Formula(const char* name, Rescaling rescaling, const Tensor& input, int64_t normalized_dims,
          int64_t weight_dims, const OptionalTensor& weight, const NormOptions& options,
          std::optional<at::ScalarType> cast_type = std::nullopt);

  Tensor output() const;   // in the op's dtype
  Tensor product() const;  // in the type that is computed in
  Tensor rstd() const;     // as the forward ops return it
  // (grad_input, grad_weight): those of output_mask.
  std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, std::array<bool, 2> output_mask,
                                      const OptionalTensor& grad_residual) const;

 private:
  const char* name_;
  const Tensor input_;
  const OptionalTensor& weight_;
  const NormOptions options_;
  const at::ScalarType compute_;
  std::vector<int64_t> normalized_dims_;  // from the end: -1, -2, ...
  std::vector<int64_t> lead_dims_;
  Tensor x_;            // the input, times the factor of a rescaled row
  Tensor inverse_rms_;  // of x_
  Tensor rstd_;         // of the input
  Tensor normalized_;   // what the gain multiplies
  Tensor gain_;         // weight + weight_offset; undefined if there is no weight
};

}  // namespace rmsnorm

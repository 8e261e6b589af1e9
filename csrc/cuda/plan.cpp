// The plans, for whoever asks: in every build, with or without the kernels.
#include "plan.h"

namespace rmsnorm::cuda {

Plan rms_norm_forward_plan(int64_t rows, int64_t cols, DType x, const Device& device) {
  return plan_forward(rows, cols, x, device);
}

Plan rms_norm_backward_plan(int64_t rows, int64_t cols, DType dy, DType x, const Device& device) {
  return plan_backward(rows, cols, dy, x, device);
}

const KernelLimits* kernel_limits(int arch) { return tuning_of(arch).limits; }

}  // namespace rmsnorm::cuda

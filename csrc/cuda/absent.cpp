// Compiled in place of the kernels where CUDA is left out of the build.
#include "../rmsnorm.h"

namespace rmsnorm::cuda {
constexpr int kNotBuilt = 1;

bool built() { return false; }
const char* architectures() { return RMSNORM_CUDA_ABSENT_REASON; }
int runtime_version() { return 0; }
int driver_version() { return 0; }
const char* error_string(int) {
  return "the CUDA kernels were not built: " RMSNORM_CUDA_ABSENT_REASON;
}
int rms_norm_forward(const RmsNormForward&, void*) { return kNotBuilt; }
int64_t rms_norm_backward_workspace(const RmsNormBackward&) { return 0; }
int rms_norm_backward(const RmsNormBackward&, void*) { return kNotBuilt; }
int rms_norm_rope_forward(const RmsNormRope*, int, void*) { return kNotBuilt; }
int64_t rms_norm_rope_backward_workspace(const RmsNormRopeBackward*, int) { return 0; }
int rms_norm_rope_backward(const RmsNormRopeBackward*, int, void*) { return kNotBuilt; }
int rms_norm_gated_forward(const RmsNormGated&, void*) { return kNotBuilt; }
int64_t rms_norm_gated_backward_workspace(const RmsNormGatedBackward&) { return 0; }
int rms_norm_gated_backward(const RmsNormGatedBackward&, void*) { return kNotBuilt; }
int rms_norm_sandwich_forward(const RmsNormSandwich&, void*) { return kNotBuilt; }
Plan last_plan() { return {}; }

}  // namespace rmsnorm::cuda

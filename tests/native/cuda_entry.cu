// A C entry to the CUDA launchers and to their plans, for cuda_check.py.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/rmsnorm.h"

using namespace rmsnorm;

#define ENTRY extern "C" __attribute__((visibility("default")))

ENTRY int sizes(int which) {
  const size_t sizes[] = {
      sizeof(RmsNormForward), sizeof(RmsNormBackward),      sizeof(cuda::Device),
      sizeof(cuda::Plan),     sizeof(RmsNormRope),          sizeof(RmsNormRopeBackward),
      sizeof(RmsNormGated),   sizeof(RmsNormGatedBackward), sizeof(RmsNormSandwich)};
  return static_cast<int>(sizes[which]);
}

ENTRY int forward(const RmsNormForward* p, void* stream) {
  return cuda::rms_norm_forward(*p, stream);
}

ENTRY int64_t workspace(const RmsNormBackward* p) { return cuda::rms_norm_backward_workspace(*p); }

ENTRY int backward(const RmsNormBackward* p, void* stream) {
  return cuda::rms_norm_backward(*p, stream);
}

ENTRY int rope_forward(const RmsNormRope* sides, int count, void* stream) {
  return cuda::rms_norm_rope_forward(sides, count, stream);
}

ENTRY int64_t rope_workspace(const RmsNormRopeBackward* sides, int count) {
  return cuda::rms_norm_rope_backward_workspace(sides, count);
}

ENTRY int rope_backward(const RmsNormRopeBackward* sides, int count, void* stream) {
  return cuda::rms_norm_rope_backward(sides, count, stream);
}

ENTRY int gated_forward(const RmsNormGated* p, void* stream) {
  return cuda::rms_norm_gated_forward(*p, stream);
}

ENTRY int64_t gated_workspace(const RmsNormGatedBackward* p) {
  return cuda::rms_norm_gated_backward_workspace(*p);
}

ENTRY int gated_backward(const RmsNormGatedBackward* p, void* stream) {
  return cuda::rms_norm_gated_backward(*p, stream);
}

ENTRY cuda::Plan gated_plan(int is_backward, int64_t rows, int64_t groups, int64_t cols, int x,
                            const cuda::Device* device) {
  const auto type = static_cast<DType>(x);
  return is_backward ? cuda::plan_gated_backward(rows, groups, cols, type, *device)
                     : cuda::plan_gated_forward(rows, groups, cols, type, *device);
}

ENTRY int sandwich_forward(const RmsNormSandwich* p, void* stream) {
  return cuda::rms_norm_sandwich_forward(*p, stream);
}

ENTRY const char* error_string(int error) { return cuda::error_string(error); }

ENTRY const char* architectures() { return cuda::built() ? cuda::architectures() : ""; }

ENTRY cuda::Device device() { return cuda::device(); }

ENTRY cuda::Plan last_plan() { return cuda::last_plan(); }

ENTRY cuda::Plan plan(int is_backward, int64_t rows, int64_t cols, int dy, int x, int wide,
                      const cuda::Device* device) {
  const auto type = [](int t) { return static_cast<DType>(t); };
  return is_backward ? cuda::plan_backward(rows, cols, type(dy), type(x), *device)
                     : cuda::plan_forward(rows, cols, type(x), *device, wide != 0);
}

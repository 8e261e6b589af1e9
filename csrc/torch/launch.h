// From checked tensors to a kernel: a launch of the forward, of any family, and one on a GPU.
#pragma once
#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <tuple>

#include "layout.h"
#include "options.h"

namespace rmsnorm {

// A thread is worth waking for this many bytes read and written: 2 us of work for a core, while
// fork and join cost 1 us hot and far more once the pool has gone to sleep. On an Emerald Rapids a
// fused addition of bf16 8x4096, which is twice this, takes 5.2 us on one core and 4.3 on two; from
// memory 16.5 and 10.5.
constexpr int64_t kGrainBytes = 128 << 10;
inline int64_t grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
}

// Can this thread have work done by OpenMP's? A forked child would wait for ever for those that its
// parent had begun to use: they stay behind.
bool has_threads();

// f(begin, end) for parts of [0, count) of `grain` items or more, in several threads at once.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || !has_threads()) return f(int64_t{0}, count);
  at::parallel_for(0, count, grain, f);
}

inline int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Bytes that a call of one part has on its stack, where a tensor would take longer to come by.
constexpr int64_t kSmallWorkspace = 8 << 10;

// Each part of a workspace begins at a cache line.
inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// f(part, parts, memory) for each of the parts that `count` items of so many bytes are worth, in
// several threads at once. Each has a workspace of its own, which is there before anything is
// written, or nullptr.
template <class F>
void in_parts(int64_t count, int64_t item_bytes, int64_t workspace_bytes, const at::Tensor& like,
              const F& f) {
  workspace_bytes = whole_lines(workspace_bytes);
  const int64_t least = grain(item_bytes), threads = at::get_num_threads();
  const int64_t parts = count * item_bytes <= kGrainBytes
                            ? 1
                            : std::clamp<int64_t>((count + least - 1) / least, 1, threads);
  if (parts == 1 && workspace_bytes <= kSmallWorkspace) {
    alignas(64) char memory[kSmallWorkspace];
    return f(int64_t{0}, parts, workspace_bytes ? memory : nullptr);
  }
  const at::Tensor workspace =
      workspace_bytes ? at::empty({parts * workspace_bytes}, like.options().dtype(at::kByte))
                      : at::Tensor();
  char* const memory = workspace_bytes ? static_cast<char*>(workspace.mutable_data_ptr()) : nullptr;
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i, parts, memory ? memory + i * workspace_bytes : nullptr);
  });
}

// Runs `launch(stream)` on the device of `t`, on its current stream. c10's virtual guard instead of
// CUDA's headers: one build loads on a CPU-only torch too.
template <class Launch>
void run_cuda(const char* op, const at::Tensor& t, const Launch& launch) {
  TORCH_CHECK(cuda::built(), op, ": input is on ", t.device(),
              ", but rmsnorm_cuda was built without CUDA (", cuda::architectures(), ")");
  const c10::DeviceGuard guard(t.device());
  const auto stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(t.device());
  const int error = launch(stream.native_handle());
  TORCH_CHECK(error == 0, op, ": CUDA kernel launch failed: ", cuda::error_string(error));
}

// What a norm of x asks of a kernel in either direction, but for its results. `weight` is dense, or
// undefined.
template <class Params>
void set_norm(Params& p, const Placed& x, int64_t lead, const at::Tensor& weight,
              const NormOptions& options) {
  const at::Tensor& t = *x.tensor;
  p.x = t.const_data_ptr();
  p.x_rows = x.rows;
  p.x_dtype = dtype(t);
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.w_dtype = weight.defined() ? dtype(weight) : p.x_dtype;
  p.rows = c10::multiply_integers(t.sizes().slice(0, lead));
  p.cols = c10::multiply_integers(t.sizes().slice(lead));
  p.eps = eps_or_default(options.eps, t);
  p.weight_offset = options.weight_offset;
  p.cast_before_weight = options.cast_before_weight;
}

// A forward that is put together piece by piece, and then run. The tensors outlive it.
class ForwardLaunch {
 public:
  // `x` is what is normalized, in all dimensions but the first `lead`.
  ForwardLaunch(const char* op, const at::Tensor& x, int64_t lead,
                const std::optional<at::Tensor>& weight, const NormOptions& options);

  // x is first written, as the sum of these. Unless round_sum, it is rounded to x for the caller
  // alone.
  void add(const at::Tensor& input, const at::Tensor& residual, bool round_sum);
  // `stream`: past the caches, if the kernel can.
  void write_to(const at::Tensor& y, const Rows& rows, bool stream);
  void write_rstd(const at::Tensor& rstd);
  // y, and the sum that it is the norm of: allocated for this call, dense.
  void outputs_are_new() { p_.fresh = true; }
  // Quantized too. `norm_type` is the dtype that the norm is rounded to before.
  void quantize(const Quant& quant, at::ScalarType norm_type);
  void run() const;

  int64_t cols() const { return p_.cols; }

 private:
  const char* op_;
  const int64_t lead_;
  const Placed x_;
  const c10::MaybeOwned<at::Tensor> weight_;
  Placed input_, residual_;
  RmsNormForward p_{};
};

// What a norm adds first, and the sum, which is left in a new tensor.
struct Sum {
  const at::Tensor& residual;
  bool round_sum;  // before it is normalized too
  at::Tensor result{};
};

// (y, rstd) in new tensors, y of this dtype. With `sum` it is the norm of input + residual. On the
// meta device, and of no elements, nothing is launched.
std::tuple<at::Tensor, at::Tensor> forward(const char* op, const at::Tensor& input, int64_t lead,
                                           const std::optional<at::Tensor>& weight,
                                           const NormOptions& options, at::ScalarType y_type,
                                           bool want_rstd, Sum* sum = nullptr);

}  // namespace rmsnorm

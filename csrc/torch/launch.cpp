#include "launch.h"

#include <unistd.h>

namespace rmsnorm {

using at::Tensor;

bool has_threads() {
  static thread_local pid_t first_used_in = 0;  // each thread has a pool of its own
  if (at::get_num_threads() == 1) return false;
  const pid_t process = getpid();
  if (first_used_in == 0) first_used_in = process;
  return first_used_in == process;
}

ForwardLaunch::ForwardLaunch(const char* op, const Tensor& x, int64_t lead,
                             const std::optional<Tensor>& weight, const NormOptions& options)
    : op_(op), lead_(lead), x_(place(x, lead)), weight_(dense(weight)) {
  set_norm(p_, x_, lead, *weight_, options);
}

void ForwardLaunch::add(const Tensor& input, const Tensor& residual, bool round_sum) {
  p_.x = x_.tensor->mutable_data_ptr();  // first: a lazy clone gets memory of its own by this
  input_ = place(input, lead_);
  residual_ = place(residual, lead_);
  p_.addends = {input_.tensor->const_data_ptr(),
                residual_.tensor->const_data_ptr(),
                dtype(input),
                input_.rows,
                residual_.rows,
                !round_sum};
}

void ForwardLaunch::write_to(const Tensor& y, const Rows& rows, bool stream) {
  p_.y = y.mutable_data_ptr();
  p_.y_rows = rows;
  p_.y_dtype = dtype(y);
  p_.stream = stream && p_.x != p_.y;
}

void ForwardLaunch::write_rstd(const Tensor& rstd) { p_.rstd = rstd.mutable_data_ptr(); }

void ForwardLaunch::quantize(const Quant& quant, at::ScalarType norm_type) {
  p_.quant = quant;
  p_.y_dtype = *as_dtype(norm_type);
  p_.y_rows = dense_rows(p_.cols);
}

void ForwardLaunch::run() const {
  const Tensor& x = *x_.tensor;
  if (!x.is_cpu()) {
    return run_cuda(op_, x, [&](void* stream) { return cuda::rms_norm_forward(p_, stream); });
  }
  cpu::isa();  // throws outside the parallel region if the environment asks for what is not there
  const int64_t y_bytes = size_of(p_.y_dtype);
  const int64_t row_elements = p_.cols * (p_.addends.input ? 2 : 1);
  const int64_t row_bytes = row_elements * (static_cast<int64_t>(x.element_size()) + y_bytes);
  in_parts(p_.rows, row_bytes, cpu::rms_norm_forward_workspace(p_), x,
           [&](int64_t part, int64_t parts, void* workspace) {
             cpu::rms_norm_forward(p_, part * p_.rows / parts, (part + 1) * p_.rows / parts,
                                   workspace);
           });
}

std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& input, int64_t lead,
                                   const std::optional<Tensor>& weight, const NormOptions& options,
                                   at::ScalarType y_type, bool want_rstd, Sum* sum) {
  std::tuple<Tensor, Tensor> results;
  auto& [y, rstd] = results;
  // y first: on one core of a Zen 2 an addition of 16 MiB takes 3.75 ms so, 4.75 the other way
  // about, where malloc has a place for one of the two results and two for the other.
  y = allocate(input.sym_sizes(), input, y_type);
  if (sum) sum->result = allocate(input.sym_sizes(), input, sum->residual.scalar_type());
  const Tensor& x = sum ? sum->result : input;
  if (want_rstd) {
    rstd = allocate(x.sym_sizes().slice(0, lead), x, rstd_type(x));
  }
  if (x.is_meta()) return results;
  if (x.numel() == 0) {
    if (want_rstd) rstd.fill_(std::numeric_limits<double>::quiet_NaN());  // a mean over nothing
    return results;
  }
  ForwardLaunch launch(op, x, lead, weight, options);
  if (sum) launch.add(input, sum->residual, sum->round_sum);
  launch.write_to(y, dense_rows(launch.cols()), cpu::writes_past_caches(y.nbytes(), true));
  if (want_rstd) launch.write_rstd(rstd);
  launch.outputs_are_new();
  launch.run();
  return results;
}

}  // namespace rmsnorm

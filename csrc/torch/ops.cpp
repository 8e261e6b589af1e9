// The ops: all schemas, and one body per op for CPU and CUDA alike, always in this order:
// check, allocate, return if empty, launch. No Python and no CUDA header, so one build loads on a CPU-only torch too.
#include <ATen/DeviceGuard.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <tuple>

#include "checks.h"
#include "signatures.h"

namespace rmsnorm {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A thread is worth waking for this many bytes read and written: 2-3 us of work for a core, while
// fork and join cost 1 us hot and far more once the pool has gone to sleep.
constexpr int64_t kGrainBytes = 256 << 10;

int64_t grain(int64_t bytes_per_item) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item)); }

// First-touch faults of 4 KiB pages cost more than the norm itself once malloc maps an output afresh
// on every call (from 32 MiB on, always). Advice only: without transparent huge pages nothing happens.
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAdviseBytes = 16 << 20;

void advise_huge_pages(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.nbytes());
  if (bytes < kAdviseBytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

bool stream_new(const Tensor& t) { return t.defined() && cpu::writes_past_caches(t.nbytes(), true); }
bool stream_owned(const Tensor& t) { return cpu::writes_past_caches(t.nbytes(), false); }

Tensor allocate(IntArrayRef shape, const Tensor& like, at::ScalarType type) {
  if (!like.is_cpu()) return at::empty(shape, like.options().dtype(type));
  Tensor t = at::detail::empty_cpu(shape, type);  // what at::empty comes to, without another trip through the dispatcher
  advise_huge_pages(t);
  return t;
}

// The last word on layout: `t` itself if its rows can be walked as they lie, else a dense copy.
struct Placed {
  Tensor tensor;
  Rows rows;
};

Placed place(const Tensor& t, int64_t lead) {
  if (const auto rows = rows_of(t, lead)) return {t, *rows};
  const Tensor dense = t.contiguous();
  return {dense, *rows_of(dense, lead)};
}

// Runs `launch(stream)` on the device of `t`, on its current stream.
template <class Launch>
void run_cuda(const char* op, const Tensor& t, const Launch& launch) {
  TORCH_CHECK(cuda::built(), op, ": input is on ", t.device(), ", but rmsnorm_cuda was built without CUDA (",
              cuda::architectures(), ")");
  const c10::DeviceGuard guard(t.device());
  const int error = launch(c10::impl::VirtualGuardImpl(at::kCUDA).getStream(t.device()).native_handle());
  TORCH_CHECK(error == 0, op, ": CUDA kernel launch failed: ", cuda::error_string(error));
}

// Forward into y, which is allocated or checked already; rstd may be undefined. With addends the input is written
// first: see rmsnorm.h. With quant, y may be undefined; it is of dtype y_type.
void forward_into(const char* op, const Tensor& input, const Geometry& geometry, const OptionalTensor& weight,
                  std::optional<double> eps, double weight_offset, bool cast_before_weight, const Tensor& y,
                  const Rows& y_rows, bool stream, const Tensor& rstd, const Addends& addends = {},
                  const Quant& quant = {}, at::ScalarType y_type = at::kFloat) {
  if (y.defined()) y_type = y.scalar_type();
  const Placed x = place(input, static_cast<int64_t>(geometry.lead.size()));
  const Tensor w = weight ? weight->contiguous() : Tensor();
  RmsNormForward p{};
  p.x = x.tensor.const_data_ptr();
  p.weight = weight ? w.const_data_ptr() : nullptr;
  p.y = y.defined() ? y.mutable_data_ptr() : nullptr;
  p.rstd = rstd.defined() ? rstd.mutable_data_ptr() : nullptr;
  p.x_rows = x.rows;
  p.y_rows = y_rows;
  p.rows = geometry.rows;
  p.cols = geometry.cols;
  p.eps = eps_or_default(eps, input);
  p.weight_offset = weight_offset;
  p.cast_before_weight = cast_before_weight;
  p.stream = stream && p.x != p.y;
  p.x_dtype = dtype(input);
  p.w_dtype = weight ? dtype(w) : p.x_dtype;
  p.y_dtype = *as_dtype(y_type);
  p.addends = addends;
  p.quant = quant;
  if (input.is_cpu()) {
    cpu::isa();  // throws here, outside the parallel region, if the environment asks for what is not there
    const int64_t row_elements = p.cols * (addends.input ? 2 : 1);
    const int64_t bytes = row_elements * static_cast<int64_t>(input.element_size() + c10::elementSize(y_type));
    // A part of the rows for each thread, with a workspace that is there before anything is written.
    const int64_t least = grain(bytes), most = at::get_num_threads();
    const int64_t parts = p.rows * bytes <= kGrainBytes ? 1 : std::clamp<int64_t>((p.rows + least - 1) / least, 1, most);
    const int64_t workspace_bytes = cpu::rms_norm_forward_workspace(p);
    const Tensor workspace = workspace_bytes ? at::empty({parts * workspace_bytes}, input.options().dtype(at::kByte)) : Tensor();
    char* const memory = workspace_bytes ? static_cast<char*>(workspace.mutable_data_ptr()) : nullptr;
    const auto part = [&](int64_t i) {
      const int64_t begin = i * p.rows / parts, end = (i + 1) * p.rows / parts;
      cpu::rms_norm_forward(p, begin, end, memory ? memory + i * workspace_bytes : nullptr);
    };
    if (parts == 1) {
      part(0);
    } else {
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) part(i);
      });
    }
  } else {
    run_cuda(op, input, [&](void* stream) { return cuda::rms_norm_forward(p, stream); });
  }
}

Tensor rms_norm(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  const Geometry geometry = check_input("rms_norm", input, normalized_shape, weight, eps, weight_offset);
  Tensor y = allocate(input.sizes(), input, output_type(input, weight, cast_before_weight));
  if (y.numel() == 0) return y;
  forward_into("rms_norm", input, geometry, weight, eps, weight_offset, cast_before_weight, y, dense_rows(geometry.cols),
               stream_new(y), Tensor());
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& input, IntArrayRef normalized_shape,
                                            const OptionalTensor& weight, std::optional<double> eps,
                                            double weight_offset, bool cast_before_weight) {
  const Geometry geometry = check_input("rms_norm", input, normalized_shape, weight, eps, weight_offset);
  Tensor y = allocate(input.sizes(), input, output_type(input, weight, cast_before_weight));
  const auto rstd_options = input.options().dtype(rstd_type(input));
  // The mean over no elements is 0 / 0.
  if (y.numel() == 0) return {y, at::full(geometry.lead, std::numeric_limits<double>::quiet_NaN(), rstd_options)};
  Tensor rstd = allocate(geometry.lead, input, rstd_type(input));
  forward_into("rms_norm", input, geometry, weight, eps, weight_offset, cast_before_weight, y,
               dense_rows(geometry.cols), stream_new(y), rstd);
  return {y, rstd};
}

void rms_norm_out(const Tensor& input, IntArrayRef normalized_shape, const OptionalTensor& weight,
                  std::optional<double> eps, double weight_offset, bool cast_before_weight, const Tensor& out) {
  const Geometry geometry = check_input("rms_norm", input, normalized_shape, weight, eps, weight_offset);
  check_shape("rms_norm", "out", out, input.sizes());
  check_device("rms_norm", "out", out, input);
  const at::ScalarType type = output_type(input, weight, cast_before_weight);
  TORCH_CHECK(out.scalar_type() == type, "rms_norm: expected out of dtype ", type, ", but got ", out.scalar_type());
  if (out.numel() == 0) return;
  const int64_t lead = static_cast<int64_t>(geometry.lead.size());
  const auto rows = rows_of(out, lead);
  TORCH_CHECK(rows, "rms_norm: expected out with dense rows (the normalized dimensions contiguous), but got strides ",
              out.strides());
  at::assert_no_internal_overlap(out);
  check_overlap("rms_norm", out, *rows, input, lead, geometry.cols);
  if (weight) check_apart("rms_norm", "out", out, *weight);
  forward_into("rms_norm", input, geometry, weight, eps, weight_offset, cast_before_weight, out, *rows, stream_owned(out),
               Tensor());
}

// The sum goes to residual_out, the norm of it to y; both may be what they are made of.
void fused_add_into(const char* op, const Tensor& input, const Tensor& residual, const Geometry& geometry,
                    const OptionalTensor& weight, std::optional<double> eps, double weight_offset,
                    bool cast_before_weight, const Tensor& y, const Rows& y_rows, const Tensor& residual_out, bool stream,
                    const Tensor& rstd) {
  const int64_t lead = static_cast<int64_t>(geometry.lead.size());
  const Placed in = place(input, lead), old = place(residual, lead);
  const Addends addends{in.tensor.const_data_ptr(), old.tensor.const_data_ptr(), dtype(input), in.rows, old.rows};
  forward_into(op, residual_out, geometry, weight, eps, weight_offset, cast_before_weight, y, y_rows, stream, rstd, addends);
}

std::tuple<Tensor, Tensor, Tensor> fused_add(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                             std::optional<double> eps, double weight_offset, bool cast_before_weight,
                                             bool want_rstd) {
  constexpr const char* op = "fused_add_rms_norm";
  check_residual(op, input, input.sizes(), residual, residual.sizes());
  const Geometry geometry = check_input(op, input, input.sizes().slice(input.dim() - 1), weight, eps, weight_offset);
  Tensor y = allocate(input.sizes(), input, output_type(input, weight, cast_before_weight));
  Tensor sum = allocate(input.sizes(), input, residual.scalar_type());
  const auto rstd_options = input.options().dtype(rstd_type(input));
  if (y.numel() == 0) {
    return {y, sum, want_rstd ? at::full(geometry.lead, std::numeric_limits<double>::quiet_NaN(), rstd_options) : Tensor()};
  }
  Tensor rstd = want_rstd ? allocate(geometry.lead, input, rstd_type(input)) : Tensor();
  fused_add_into(op, input, residual, geometry, weight, eps, weight_offset, cast_before_weight, y,
                 dense_rows(geometry.cols), sum, stream_new(y), rstd);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                              std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  const auto [y, sum, rstd] = fused_add(input, residual, weight, eps, weight_offset, cast_before_weight, false);
  return {y, sum};
}

std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_forward(const Tensor& input, const Tensor& residual,
                                                              const OptionalTensor& weight, std::optional<double> eps,
                                                              double weight_offset, bool cast_before_weight) {
  return fused_add(input, residual, weight, eps, weight_offset, cast_before_weight, true);
}

void fused_add_rms_norm_(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                         std::optional<double> eps, double weight_offset, bool cast_before_weight) {
  constexpr const char* op = "fused_add_rms_norm_";
  check_residual(op, input, input.sizes(), residual, residual.sizes());
  const Geometry geometry = check_input(op, input, input.sizes().slice(input.dim() - 1), weight, eps, weight_offset);
  const at::ScalarType type = output_type(input, weight, cast_before_weight);
  TORCH_CHECK(type == input.scalar_type(), op, ": the result has dtype ", type, " and cannot take the place of input, which has ",
              input.scalar_type(), "; use fused_add_rms_norm");
  if (input.numel() == 0) return;
  const int64_t lead = static_cast<int64_t>(geometry.lead.size());
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"input", input}, {"residual", residual}}) {
    const auto rows = rows_of(t, lead);
    TORCH_CHECK(rows, op, ": expected ", name, " with dense rows (the last dimension contiguous), but got strides ", t.strides());
    check_overlap(op, t, *rows, t, lead, geometry.cols, name, name);
    if (weight) check_apart(op, name, t, *weight);
  }
  check_apart(op, "input", input, residual, "residual", lead, geometry.cols);
  fused_add_into(op, input, residual, geometry, weight, eps, weight_offset, cast_before_weight, input,
                 *rows_of(input, lead), residual, false, Tensor());
}

void fused_add_rms_norm_out(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                            std::optional<double> eps, double weight_offset, bool cast_before_weight, const Tensor& out,
                            const Tensor& residual_out) {
  constexpr const char* op = "fused_add_rms_norm";
  check_residual(op, input, input.sizes(), residual, residual.sizes());
  const Geometry geometry = check_input(op, input, input.sizes().slice(input.dim() - 1), weight, eps, weight_offset);
  const int64_t lead = static_cast<int64_t>(geometry.lead.size());
  const std::tuple<const char*, const Tensor&, at::ScalarType, const char*, const Tensor&> results[] = {
      {"out", out, output_type(input, weight, cast_before_weight), "input", input},
      {"residual_out", residual_out, residual.scalar_type(), "residual", residual}};
  for (const auto& [name, t, type, replaced_name, replaced] : results) {
    check_shape(op, name, t, input.sizes());
    check_device(op, name, t, input);
    TORCH_CHECK(t.scalar_type() == type, op, ": expected ", name, " of dtype ", type, ", but got ", t.scalar_type());
    if (t.numel() == 0) continue;
    const auto rows = rows_of(t, lead);
    TORCH_CHECK(rows, op, ": expected ", name, " with dense rows (the last dimension contiguous), but got strides ", t.strides());
    check_overlap(op, t, *rows, replaced, lead, geometry.cols, name, replaced_name);
    if (weight) check_apart(op, name, t, *weight);
  }
  check_apart(op, "out", out, residual_out, "residual_out", lead, geometry.cols);
  check_apart(op, "out", out, residual, "residual", lead, geometry.cols);
  check_apart(op, "residual_out", residual_out, input, "input", lead, geometry.cols);
  if (input.numel() == 0) return;
  fused_add_into(op, input, residual, geometry, weight, eps, weight_offset, cast_before_weight, out, *rows_of(out, lead),
                 residual_out, false, Tensor());
}

// In 8 bits. scale and norm have no elements where they are not wanted: a compiler that writes into its own buffers can
// only do so if each result is a tensor.
struct Quantized {
  Tensor output, scale, sum, norm;
};

struct QuantCall {
  const char* op;
  const Tensor& input;
  const Tensor* residual;  // nullptr: no addition
  const OptionalTensor& weight;
  std::optional<double> eps;
  QuantOptions options;
  bool keep_norm;
  double weight_offset;
  bool cast_before_weight;

  Geometry geometry() const {
    TORCH_CHECK_VALUE(input.dim() > 0, op, ": expected input with at least one dimension, but got a scalar");
    if (residual) check_residual(op, input, input.sizes(), *residual, residual->sizes());
    const Geometry result = check_input(op, input, input.sizes().slice(input.dim() - 1), weight, eps, weight_offset);
    check_quant(op, input, weight, options, result.cols);
    return result;
  }
  at::ScalarType norm_type() const { return output_type(input, weight, cast_before_weight); }

  std::vector<int64_t> scale_shape(const Geometry& g) const {
    if (options.scale) return {0};
    std::vector<int64_t> shape = g.lead.vec();
    shape.push_back(options.block ? g.cols / *options.block : 1);
    return shape;
  }
  Tensor allocate_scale(const Geometry& g) const {
    std::vector<int64_t> shape = scale_shape(g);
    if (!options.column_major) return allocate(shape, input, at::kFloat);
    std::rotate(shape.begin(), shape.end() - 1, shape.end());
    return allocate(shape, input, at::kFloat).movedim(0, -1);
  }
  Quantized allocate_results(const Geometry& g) const {
    const std::array<int64_t, 1> none{0};
    return {allocate(input.sizes(), input, options.dtype), allocate_scale(g),
            residual ? allocate(input.sizes(), input, residual->scalar_type()) : Tensor(),
            allocate(keep_norm ? input.sizes() : IntArrayRef(none), input, norm_type())};
  }

  // Of results that the caller owns.
  void check(const Geometry& g, const Quantized& to) const {
    const auto own = [&](const char* name, const Tensor& t, IntArrayRef shape, at::ScalarType type, bool column_major = false) {
      check_shape(op, name, t, shape);
      check_device(op, name, t, input);
      TORCH_CHECK(t.scalar_type() == type, op, ": expected ", name, " of dtype ", type, ", but got ", t.scalar_type());
      TORCH_CHECK((column_major ? t.movedim(-1, 0) : t).is_contiguous(), op, ": expected ", name,
                  column_major ? " to be column-major" : " to be contiguous", ", but got strides ", t.strides());
    };
    own("out", to.output, input.sizes(), options.dtype);
    own("scale_out", to.scale, scale_shape(g), at::kFloat, options.column_major);
    if (residual) own("residual_out", to.sum, input.sizes(), residual->scalar_type());
    const std::array<int64_t, 1> none{0};
    own("norm_out", to.norm, keep_norm ? input.sizes() : IntArrayRef(none), norm_type());
    const std::pair<const char*, const Tensor*> written[] = {
        {"out", &to.output}, {"scale_out", &to.scale}, {"residual_out", &to.sum}, {"norm_out", &to.norm}};
    for (const auto& [name, t] : written) {
      if (!t->defined()) continue;
      if (t != &to.sum) check_apart(op, name, *t, input, "input");
      if (residual && t != &to.sum) check_apart(op, name, *t, *residual, "residual");
      if (weight) check_apart(op, name, *t, *weight);
      if (options.scale) check_apart(op, name, *t, *options.scale, "scale");
      for (const auto& [other_name, other] : written) {
        if (other < t && other->defined()) check_apart(op, name, *t, *other, other_name);
      }
    }
    const int64_t lead = static_cast<int64_t>(g.lead.size());
    if (residual && to.sum.numel() > 0) {
      check_overlap(op, to.sum, dense_rows(g.cols), *residual, lead, g.cols, "residual_out", "residual");
      check_apart(op, "residual_out", to.sum, input, "input");
    }
  }

  void run(const Geometry& g, const Quantized& to) const {
    const QType type = *as_qtype(options.dtype);
    const float most = type == QType::kInt8 ? 127.0f : type == QType::kFloat8E4M3 ? 448.0f : 57344.0f;
    const float least = type == QType::kInt8 ? std::numeric_limits<float>::epsilon() : 1.0f / (most * 512.0f);
    if (input.numel() == 0) {
      if (to.scale.numel() > 0) to.scale.fill_(least);
      return;
    }
    Quant q{};
    q.data = to.output.mutable_data_ptr();
    q.dtype = type;
    q.least = least;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double bound = options.scale_ub.value_or(kInfinity);
    q.bound = static_cast<float>(bound > std::numeric_limits<float>::max() ? kInfinity : bound);
    q.block = options.scale ? 0 : options.block.value_or(g.cols);
    const int64_t blocks = options.block ? g.cols / *options.block : 1;
    q.row_stride = options.column_major ? 1 : blocks;
    q.block_stride = options.column_major ? g.rows : 1;
    // The kernels only read a scale that is given.
    q.scale = options.scale ? const_cast<float*>(options.scale->const_data_ptr<float>()) : to.scale.mutable_data_ptr<float>();
    Addends addends{};
    const int64_t lead = static_cast<int64_t>(g.lead.size());
    Placed in, old;
    if (residual) {
      in = place(input, lead), old = place(*residual, lead);
      addends = {in.tensor.const_data_ptr(), old.tensor.const_data_ptr(), dtype(input), in.rows, old.rows};
    }
    forward_into(op, residual ? to.sum : input, g, weight, eps, weight_offset, cast_before_weight,
                 keep_norm ? to.norm : Tensor(), dense_rows(g.cols), false, Tensor(), addends, q, norm_type());
  }
  Quantized operator()() const {
    const Geometry g = geometry();
    Quantized results = allocate_results(g);
    run(g, results);
    return results;
  }
  void operator()(const Quantized& to) const {
    const Geometry g = geometry();
    check(g, to);
    run(g, to);
  }
};

std::tuple<Tensor, Tensor, Tensor> rms_norm_quant(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& scale,
                                                  std::optional<double> eps, at::ScalarType dtype, std::optional<int64_t> block,
                                                  std::optional<double> scale_ub, bool column_major, bool keep_norm,
                                                  double weight_offset, bool cast_before_weight) {
  const QuantOptions options{dtype, scale, block, scale_ub, column_major};
  const Quantized r = QuantCall{"rms_norm_quant", input, nullptr, weight, eps, options, keep_norm, weight_offset, cast_before_weight}();
  return {r.output, r.scale, r.norm};
}

void rms_norm_quant_out(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& scale, std::optional<double> eps,
                        at::ScalarType dtype, std::optional<int64_t> block, std::optional<double> scale_ub, bool column_major,
                        bool keep_norm, double weight_offset, bool cast_before_weight, const Tensor& out,
                        const Tensor& scale_out, const Tensor& norm_out) {
  const QuantOptions options{dtype, scale, block, scale_ub, column_major};
  QuantCall{"rms_norm_quant", input, nullptr, weight, eps, options, keep_norm, weight_offset, cast_before_weight}(
      Quantized{out, scale_out, Tensor(), norm_out});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_add_rms_norm_quant(
    const Tensor& input, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& scale,
    std::optional<double> eps, at::ScalarType dtype, std::optional<int64_t> block, std::optional<double> scale_ub,
    bool column_major, bool keep_norm, double weight_offset, bool cast_before_weight) {
  const QuantOptions options{dtype, scale, block, scale_ub, column_major};
  const Quantized r = QuantCall{"fused_add_rms_norm_quant", input, &residual, weight, eps, options, keep_norm, weight_offset,
                                cast_before_weight}();
  return {r.output, r.scale, r.sum, r.norm};
}

void fused_add_rms_norm_quant_out(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                  const OptionalTensor& scale, std::optional<double> eps, at::ScalarType dtype,
                                  std::optional<int64_t> block, std::optional<double> scale_ub, bool column_major, bool keep_norm,
                                  double weight_offset, bool cast_before_weight, const Tensor& out, const Tensor& scale_out,
                                  const Tensor& residual_out, const Tensor& norm_out) {
  const QuantOptions options{dtype, scale, block, scale_ub, column_major};
  QuantCall{"fused_add_rms_norm_quant", input, &residual, weight, eps, options, keep_norm, weight_offset, cast_before_weight}(
      Quantized{out, scale_out, residual_out, norm_out});
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input,
                                             IntArrayRef normalized_shape, const OptionalTensor& weight,
                                             const Tensor& rstd, std::optional<double> eps,
                                             std::array<bool, 2> output_mask, const OptionalTensor& grad_residual,
                                             double weight_offset, bool cast_before_weight) {
  constexpr const char* op = "rms_norm_backward";
  const Geometry geometry = check_input(op, input, normalized_shape, weight, eps, weight_offset);
  check_dtype(op, "grad_output", grad_output);
  check_shape(op, "grad_output", grad_output, input.sizes());
  check_device(op, "grad_output", grad_output, input);
  check_shape(op, "rstd", rstd, geometry.lead);
  check_device(op, "rstd", rstd, input);
  TORCH_CHECK(rstd.scalar_type() == rstd_type(input), op, ": expected rstd of dtype ", rstd_type(input), ", but got ",
              rstd.scalar_type());
  if (grad_residual) {
    check_shape(op, "grad_residual", *grad_residual, input.sizes());
    check_device(op, "grad_residual", *grad_residual, input);
    TORCH_CHECK(grad_residual->scalar_type() == input.scalar_type(), op, ": expected grad_residual of input's dtype ",
                input.scalar_type(), ", but got ", grad_residual->scalar_type());
  }
  const bool want_dweight = output_mask[1] && weight.has_value();
  Tensor dx = output_mask[0] ? allocate(input.sizes(), input, input.scalar_type()) : Tensor();
  if (input.numel() == 0) return {dx, want_dweight ? at::zeros(normalized_shape, weight->options()) : Tensor()};
  Tensor dweight = want_dweight ? at::empty(normalized_shape, weight->options()) : Tensor();
  if (!dx.defined() && !want_dweight) return {dx, dweight};

  const int64_t lead = static_cast<int64_t>(geometry.lead.size());
  const Placed dy = place(grad_output, lead);
  const Placed x = place(input, lead);
  const Placed other = grad_residual ? place(*grad_residual, lead) : Placed{};
  const Tensor w = weight ? weight->contiguous() : Tensor();
  const Tensor dense_rstd = rstd.contiguous();
  RmsNormBackward p{};
  p.dy = dy.tensor.const_data_ptr();
  p.x = x.tensor.const_data_ptr();
  p.weight = weight ? w.const_data_ptr() : nullptr;
  p.rstd = dense_rstd.const_data_ptr();
  if (grad_residual) {
    p.dresidual = other.tensor.const_data_ptr();
    p.dresidual_rows = other.rows;
  }
  p.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  p.dweight = want_dweight ? dweight.mutable_data_ptr() : nullptr;
  p.dy_rows = dy.rows;
  p.x_rows = x.rows;
  p.rows = geometry.rows;
  p.cols = geometry.cols;
  p.eps = eps_or_default(eps, input);
  p.weight_offset = weight_offset;
  p.cast_before_weight = cast_before_weight;
  p.stream = stream_new(dx);
  p.dy_dtype = dtype(grad_output);
  p.x_dtype = dtype(input);
  p.w_dtype = weight ? dtype(w) : p.x_dtype;
  const auto allocate_workspace = [&](int64_t bytes) {
    Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
    p.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
    return workspace;
  };
  if (input.is_cpu()) {
    cpu::isa();
    const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
    const Tensor workspace = allocate_workspace(plan.workspace_bytes);
    const int64_t row_bytes = p.cols * static_cast<int64_t>(2 * input.element_size() + grad_output.element_size());
    at::parallel_for(0, plan.blocks, grain(std::min(plan.block_rows, p.rows) * row_bytes),
                     [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(p, begin, end); });
    if (want_dweight) {
      at::parallel_for(0, p.cols, grain(plan.workspace_bytes / p.cols),
                       [&](int64_t begin, int64_t end) { cpu::rms_norm_backward_dweight(p, begin, end); });
    }
  } else {
    run_cuda(op, input, [&](void* stream) {
      const Tensor workspace = allocate_workspace(cuda::rms_norm_backward_workspace(p));
      return cuda::rms_norm_backward(p, stream);
    });
  }
  return {dx, dweight};
}

}  // namespace

// .out returns nothing, so that functionalization takes it as it is: an op that returns its argument needs the tag
// at::Tag::out for that, and then Inductor (2.13) calls .out into buffers of its own, but wrongly: that of rms_norm with its
// arguments out of order, and those with several results with buffers that it never made, where one is not used.
TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) {
    TORCH_WARN("rmsnorm_cuda: another copy of librmsnorm_torch.so was loaded before, and its ops are used");
    return;
  }
  // Each also as _formula: ATen ops instead of a kernel.
  for (const std::string formula : {"", "_formula"}) {
    const auto def = [&](const char* name, const char* arguments, const char* results) {
      m.def((name + formula + "(" + arguments + ", float weight_offset=0.0, bool cast_before_weight=False) -> " + results).c_str());
    };
    const char* norm = "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *";
    const char* fused = "Tensor input, Tensor residual, Tensor? weight=None, float? eps=None, *";
    def("rms_norm", norm, "Tensor");
    def("rms_norm_forward", norm, "(Tensor output, Tensor rstd)");
    def("rms_norm_backward", "Tensor grad_output, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor rstd, "
        "float? eps, bool[2] output_mask, Tensor? grad_residual=None, *", "(Tensor grad_input, Tensor grad_weight)");
    def("fused_add_rms_norm", fused, "(Tensor output, Tensor residual_out)");
    def("fused_add_rms_norm_forward", fused, "(Tensor output, Tensor residual_out, Tensor rstd)");
  }
  m.def("rms_norm.out(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
        "float weight_offset=0.0, bool cast_before_weight=False, Tensor(a!) out) -> ()");
  const std::string quant = "float? eps=None, *, ScalarType dtype, int? block=None, float? scale_ub=None, "
                            "bool column_major=False, bool keep_norm=False, float weight_offset=0.0, bool cast_before_weight=False";
  const std::string fused = "fused_add_rms_norm_quant", rows = "Tensor? weight=None, Tensor? scale=None, " + quant;
  m.def(("rms_norm_quant(Tensor input, " + rows + ") -> (Tensor output, Tensor scale, Tensor norm)").c_str());
  m.def((fused + "(Tensor input, Tensor residual, " + rows + ") -> (Tensor output, Tensor scale, Tensor residual_out, Tensor norm)").c_str());
  m.def("fused_add_rms_norm.out(Tensor input, Tensor residual, Tensor? weight=None, float? eps=None, *, "
        "float weight_offset=0.0, bool cast_before_weight=False, Tensor(a!) out, Tensor(b!) residual_out) -> ()");
  m.def(("rms_norm_quant.out(Tensor input, " + rows + ", Tensor(a!) out, Tensor(b!) scale_out, Tensor(c!) norm_out) -> ()").c_str());
  m.def((fused + ".out(Tensor input, Tensor residual, " + rows + ", Tensor(a!) out, Tensor(b!) scale_out, "
         "Tensor(c!) residual_out, Tensor(d!) norm_out) -> ()").c_str());
  m.def("fused_add_rms_norm_(Tensor(a!) input, Tensor(b!) residual, Tensor? weight=None, float? eps=None, *, "
        "float weight_offset=0.0, bool cast_before_weight=False) -> ()");
}

namespace {

void register_kernels(torch::Library& m) {
  if (registered_elsewhere()) return;
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm.out", rms_norm_out);
  m.impl("rms_norm_forward", rms_norm_forward);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("fused_add_rms_norm", fused_add_rms_norm);
  m.impl("fused_add_rms_norm_forward", fused_add_rms_norm_forward);
  m.impl("fused_add_rms_norm_", fused_add_rms_norm_);
  m.impl("fused_add_rms_norm.out", fused_add_rms_norm_out);
  m.impl("rms_norm_quant", rms_norm_quant);
  m.impl("rms_norm_quant.out", rms_norm_quant_out);
  m.impl("fused_add_rms_norm_quant", fused_add_rms_norm_quant);
  m.impl("fused_add_rms_norm_quant.out", fused_add_rms_norm_quant_out);
}

}  // namespace

TORCH_LIBRARY_IMPL(rmsnorm_cuda, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(rmsnorm_cuda, CUDA, m) { register_kernels(m); }

bool registered_elsewhere() {
  // Asked first before anything of this copy is defined.
  static const bool is = c10::Dispatcher::singleton().findSchema({"rmsnorm_cuda::rms_norm", ""}).has_value();
  return is;
}

}  // namespace rmsnorm

// Every check of the op layer: what came, what was expected, in torch's words and exception types.
// check_*() run before anything is allocated or written.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "../rmsnorm.h"

namespace rmsnorm {

inline std::optional<DType> as_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kDouble: return DType::kFloat64;
    default: return std::nullopt;
  }
}

inline DType dtype(const at::Tensor& t) { return *as_dtype(t.scalar_type()); }

inline void check_dtype(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(as_dtype(t.scalar_type()), op, ": \"", op, "\" not implemented for '", t.scalar_type(),
                              "': expected ", name, " to be float32, float16, bfloat16 or float64");
}

inline void check_device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), op, ": expected all tensors to be on the same device, but input is on ",
              input.device(), " and ", name, " is on ", t.device());
}

// A tensor may have elements and no memory: FSDP and offloading free a storage until it is gathered again.
inline void check_memory(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(!t.has_storage() || t.unsafeGetTensorImpl()->storage_initialized(), op, ": expected ", name,
              " to have memory, but its storage was freed (as FSDP and offloading do until the tensor is gathered again)");
}

// Sizes of tensors that a kernel reads; those of a compiler are SymInt, and behind them is no memory.
template <class Int>
constexpr bool kInMemory = std::is_same_v<Int, int64_t>;

// Of what a kernel reads or writes.
inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  check_memory(op, name, t);
  TORCH_CHECK(t.sizes() == shape, op, ": expected ", name, " of shape ", shape, ", but got ", t.sizes());
}

// The arguments that all ops have. Sizes are int64_t, or SymInt where a compiler traces with sizes unknown.
template <class Int>
void check_arguments(const char* op, const at::Tensor& input, c10::ArrayRef<Int> sizes,
                     c10::ArrayRef<Int> normalized_shape, const std::optional<at::Tensor>& weight,
                     c10::ArrayRef<Int> weight_sizes, std::optional<double> eps, double weight_offset) {
  const int64_t normalized = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(normalized > 0, op, ": expected normalized_shape to be at least 1-dimensional, i.e., containing at least "
              "one element, but got normalized_shape=", normalized_shape);
  check_dtype(op, "input", input);
  if constexpr (kInMemory<Int>) {
    check_memory(op, "input", input);
    if (weight) check_memory(op, "weight", *weight);
  }
  TORCH_CHECK_VALUE(input.dim() >= normalized, op, ": input tensor must have at least ", normalized,
                    " dimensions for normalized_shape=", normalized_shape, ", but got ", input.dim());
  TORCH_CHECK(sizes.slice(input.dim() - normalized) == normalized_shape, op, ": given normalized_shape=",
              normalized_shape, ", expected input with shape [*, ", c10::Join(", ", normalized_shape),
              "], but got input of size ", sizes);
  if (weight) {
    check_dtype(op, "weight", *weight);
    TORCH_CHECK(weight_sizes == normalized_shape, op,
                ": expected weight to be of same shape as normalized_shape, but got weight of shape ", weight_sizes,
                " and normalized_shape=", normalized_shape);
    check_device(op, "weight", *weight, input);
  }
  TORCH_CHECK_VALUE(!eps || (*eps >= 0 && std::isfinite(*eps)), op, ": expected eps to be finite and not negative, but got ",
                    *eps);
  TORCH_CHECK_VALUE(std::isfinite(weight_offset), op, ": expected weight_offset to be finite, but got ", weight_offset);
}

// The residual of a fused add: input's shape, and its dtype or, beside 16 bits, fp32.
template <class Int>
void check_residual(const char* op, const at::Tensor& input, c10::ArrayRef<Int> sizes, const at::Tensor& residual,
                    c10::ArrayRef<Int> residual_sizes) {
  TORCH_CHECK_VALUE(input.dim() > 0, op, ": expected input with at least one dimension, but got a scalar");
  TORCH_CHECK(residual_sizes == sizes, op, ": expected residual of input's shape ", sizes, ", but got ", residual_sizes);
  check_device(op, "residual", residual, input);
  if constexpr (kInMemory<Int>) check_memory(op, "residual", residual);
  const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK(residual.scalar_type() == input.scalar_type() || (half && residual.scalar_type() == at::kFloat), op,
              ": expected residual of input's dtype ", input.scalar_type(), half ? " or of Float" : "", ", but got ",
              residual.scalar_type());
}

// An [*lead, *normalized_shape] tensor as [rows, cols].
struct Geometry {
  at::IntArrayRef lead;  // shape before the normalized dimensions
  int64_t rows;
  int64_t cols;
};

inline Geometry check_input(const char* op, const at::Tensor& input, at::IntArrayRef normalized_shape,
                            const std::optional<at::Tensor>& weight, std::optional<double> eps, double weight_offset) {
  check_arguments(op, input, input.sizes(), normalized_shape, weight, weight ? weight->sizes() : at::IntArrayRef(), eps,
                  weight_offset);
  const at::IntArrayRef lead = input.sizes().slice(0, input.dim() - normalized_shape.size());
  return {lead, c10::multiply_integers(lead), c10::multiply_integers(normalized_shape)};
}

// eps=None is the machine epsilon of the type that is computed in, as in torch.nn.functional.rms_norm.
inline double eps_or_default(std::optional<double> eps, const at::Tensor& input) {
  if (eps) return *eps;
  return input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                            : std::numeric_limits<float>::epsilon();
}

inline at::ScalarType output_type(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  bool cast_before_weight) {
  return cast_before_weight && weight ? c10::promoteTypes(input.scalar_type(), weight->scalar_type())
                                      : input.scalar_type();
}

inline at::ScalarType rstd_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Where the rows of `t` start: its first `lead` dimensions, merged. nullopt: the other dimensions
// are not dense, or what is left after merging has too many dimensions; then a dense copy is needed.
inline std::optional<Rows> rows_of(const at::Tensor& t, int64_t lead) {
  int64_t dense = 1;
  for (int64_t d = t.dim() - 1; d >= lead; --d) {
    if (t.size(d) != 1 && t.stride(d) != dense) return std::nullopt;
    dense *= t.size(d);
  }
  Rows rows{1, {1}, {dense}};
  bool first = true;
  for (int64_t d = 0; d < lead; ++d) {
    if (t.size(d) == 1) continue;
    const int last = rows.ndim - 1;
    if (first) {
      rows.size[0] = t.size(d);
      rows.stride[0] = t.stride(d);
      first = false;
    } else if (rows.stride[last] == t.stride(d) * t.size(d)) {
      rows.size[last] *= t.size(d);
      rows.stride[last] = t.stride(d);
    } else if (rows.ndim < Rows::kMaxDims) {
      rows.size[rows.ndim] = t.size(d);
      rows.stride[rows.ndim] = t.stride(d);
      ++rows.ndim;
    } else {
      return std::nullopt;
    }
  }
  return rows;
}

// Might two rows share elements? Each dimension has to step over all that those with smaller strides span. Asked of
// outputs, whose rows are written at the same time.
inline bool rows_overlap(const Rows& rows, int64_t cols) {
  for (int d = 0; d < rows.ndim; ++d) {
    int64_t extent = cols;
    for (int e = 0; e < rows.ndim; ++e) {
      const bool smaller = rows.stride[e] < rows.stride[d] || (rows.stride[e] == rows.stride[d] && e < d);
      if (smaller) extent += (rows.size[e] - 1) * rows.stride[e];
    }
    if (rows.size[d] > 1 && rows.stride[d] < extent) return true;
  }
  return false;
}

// The addresses that the elements of t lie in.
inline std::pair<const char*, const char*> span_of(const at::Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const char* const begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.element_size() != b.element_size()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Are a and b seen to share no element? They may lie in the same memory if their rows do in turns, as two slices of one
// fused projection; that is looked at where the rows have `cols` columns after `lead` dimensions.
inline bool apart(const at::Tensor& a, const at::Tensor& b, int64_t lead = 0, int64_t cols = 0) {
  if (a.numel() == 0 || b.numel() == 0 || !a.is_alias_of(b)) return true;
  const auto [a_begin, a_end] = span_of(a);
  const auto [b_begin, b_end] = span_of(b);
  if (a_begin >= b_end || b_begin >= a_end) return true;
  const auto rows = rows_of(a, lead);
  if (cols == 0 || !rows || !same_layout(a, b)) return false;
  int64_t extent = cols;  // of what repeats every rows->stride[0] elements
  for (int d = 1; d < rows->ndim; ++d) extent += (rows->size[d] - 1) * rows->stride[d];
  const int64_t size = static_cast<int64_t>(a.element_size()), period = rows->stride[0] * size;
  const int64_t phase = period > 0 ? (((a_begin - b_begin) % period) + period) % period : 0;
  return phase >= extent * size && period - phase >= extent * size;
}

// An out= that is what it replaces is fine, and so is one that is apart from it.
inline void check_overlap(const char* op, const at::Tensor& out, const Rows& out_rows, const at::Tensor& input,
                          int64_t lead, int64_t cols, const char* name = "out", const char* input_name = "input") {
  TORCH_CHECK(!rows_overlap(out_rows, cols), op, ": expected ", name, " with rows that do not overlap, but got strides ",
              out.strides(), " for shape ", out.sizes());
  const bool same = out.const_data_ptr() == input.const_data_ptr() && same_layout(out, input);
  TORCH_CHECK(same || apart(out, input, lead, cols), op, ": ", name, " partly overlaps ", input_name, "; expected ", name, " to be ",
              input_name, " itself or memory of its own");
}

// What is read while others write may not lie in the memory that is written; nor may two outputs share any.
inline void check_apart(const char* op, const char* name, const at::Tensor& out, const at::Tensor& other,
                        const char* other_name = "weight", int64_t lead = 0, int64_t cols = 0) {
  TORCH_CHECK(apart(out, other, lead, cols), op, ": ", name, " and ", other_name,
              " share memory: some elements of the input tensor and the written-to tensor refer to a single location");
}

// How rms_norm_quant and its like are to quantize.
struct QuantOptions {
  at::ScalarType dtype;
  std::optional<at::Tensor> scale;
  std::optional<int64_t> block;
  std::optional<double> scale_ub;
  bool column_major;
};

inline std::optional<QType> as_qtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat8_e4m3fn: return QType::kFloat8E4M3;
    case at::kFloat8_e5m2: return QType::kFloat8E5M2;
    case at::kChar: return QType::kInt8;
    default: return std::nullopt;
  }
}

inline void check_quant(const char* op, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                        const QuantOptions& q, int64_t cols) {
  TORCH_CHECK_VALUE(as_qtype(q.dtype), op, ": expected dtype to be float8_e4m3fn, float8_e5m2 or int8, but got ", q.dtype);
  TORCH_CHECK_NOT_IMPLEMENTED(input.scalar_type() != at::kDouble && !(weight && weight->scalar_type() == at::kDouble), op, ": \"",
                              op, "\" not implemented for 'Double': expected input and weight to be float32, float16 or bfloat16");
  if (q.scale) {
    TORCH_CHECK(q.scale->scalar_type() == at::kFloat && q.scale->numel() == 1, op,
                ": expected scale to be one float32, but got ", q.scale->scalar_type(), " of shape ", q.scale->sizes());
    check_device(op, "scale", *q.scale, input);
    check_memory(op, "scale", *q.scale);
    TORCH_CHECK_VALUE(!q.block && !q.scale_ub, op, ": block and scale_ub are for scales that are found; expected neither beside a given scale, but got ",
                      q.block ? "block" : "scale_ub");
  }
  if (q.block) {
    TORCH_CHECK_VALUE(*q.block == 64 || *q.block == 128, op, ": expected block to be 64 or 128, but got ", *q.block);
    TORCH_CHECK(cols % *q.block == 0, op, ": expected a last dimension that is a multiple of block=", *q.block, ", but got ", cols);
  }
  TORCH_CHECK_VALUE(!q.scale_ub || *q.scale_ub > 0, op, ": expected scale_ub to be positive, but got ", *q.scale_ub);
  TORCH_CHECK_VALUE(!q.column_major || q.block, op, ": column-major scales are those of blocks; expected block to be given");
}

inline Rows dense_rows(int64_t cols) { return Rows{1, {1}, {cols}}; }

}  // namespace rmsnorm

#include "checks.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>

namespace rmsnorm {

using at::Tensor;
using c10::SymIntArrayRef;

namespace {

bool same_sizes(SymIntArrayRef a, SymIntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    const bool known = !a[i].is_heap_allocated() && !b[i].is_heap_allocated();
    const bool same = known ? a[i].as_int_unchecked() == b[i].as_int_unchecked()
                            : a[i].sym_eq(b[i]).expect_true(__FILE__, __LINE__);
    if (!same) return false;
  }
  return true;
}

}  // namespace

void refuse_dtype(const char* op, const Tensor& t, const std::string& expected) {
  const std::string message =
      c10::str(op, ": \"", op, "\" not implemented for '", t.scalar_type(), "': ", expected);
  // A compiler's FakeTensor takes NotImplementedError from a Meta kernel for "there is none", and
  // hides the message: there it is its base class, RuntimeError.
  TORCH_CHECK(!t.is_meta(), message);
  TORCH_CHECK_NOT_IMPLEMENTED(false, message);
}

void check_dtype(const char* op, const char* name, const Tensor& t) {
  if (as_dtype(t.scalar_type())) return;
  refuse_dtype(op, t, c10::str("expected ", name, " to be float32, float16, bfloat16 or float64"));
}

bool fits_storage_by_strides(const Tensor& t) {
  const size_t bytes =
      at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
  return t.numel() == 0 || bytes <= t.storage().nbytes();
}

void refuse_tensors(const c10::OperatorHandle& op, c10::ArrayRef<const Tensor*> tensors) {
  using Keys = c10::DispatchKeySet;
  static constexpr Keys kTraced =
      Keys(c10::DispatchKey::Python) | Keys(c10::DispatchKey::Functionalize);
  const auto is_traced = [](const Tensor& t) {
    return t.is_meta() || !t.has_storage() || t.key_set().has_any(kTraced);
  };
  const auto& arguments = op.schema().arguments();
  std::string name = op.schema().name();  // as the function is called
  name.erase(0, name.find("::") + 2);
  if (const auto end = name.rfind("_forward"); end != std::string::npos) name.erase(end);
  const auto index = op.schema().argumentIndexWithName("input");
  const size_t main = index ? *index : *op.schema().argumentIndexWithName("q");
  const Tensor& input = *tensors[main];
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i] || !tensors[i]->defined()) continue;
    const Tensor& t = *tensors[i];
    TORCH_CHECK(t.device() == input.device(), name,
                ": expected all tensors to be on the same device, but ", arguments[main].name(),
                " is on ", input.device(), " and ", arguments[i].name(), " is on ", t.device());
    if (is_traced(t)) continue;
    TORCH_CHECK(t.unsafeGetTensorImpl()->storage_initialized(), name, ": expected ",
                arguments[i].name(),
                " to have memory, but its storage was freed (as FSDP and offloading do until the "
                "tensor is gathered again)");
    TORCH_CHECK(fits_storage(t), name, ": expected ", arguments[i].name(), " of size ", t.sizes(),
                " to lie in its storage, but that has only ", t.storage().nbytes(), " bytes");
  }
}

void check_norm(const char* op, const Tensor& input, SymIntArrayRef normalized_shape,
                const OptionalTensor& weight, const NormOptions& options) {
  const int64_t normalized = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(normalized > 0, op,
              ": expected normalized_shape to be at least 1-dimensional, i.e., containing at least "
              "one element, but got normalized_shape=",
              normalized_shape);
  check_dtype(op, "input", input);
  TORCH_CHECK_VALUE(input.dim() >= normalized, op, ": input tensor must have at least ", normalized,
                    " dimensions for normalized_shape=", normalized_shape, ", but got ",
                    input.dim());
  const SymIntArrayRef sizes = input.sym_sizes();
  TORCH_CHECK(same_sizes(sizes.slice(input.dim() - normalized), normalized_shape), op,
              ": given normalized_shape=", normalized_shape, ", expected input with shape [*, ",
              c10::Join(", ", normalized_shape), "], but got input of size ", sizes);
  if (weight) {
    check_dtype(op, "weight", *weight);
    TORCH_CHECK(
        same_sizes(weight->sym_sizes(), normalized_shape), op,
        ": expected weight to be of same shape as normalized_shape, but got weight of shape ",
        weight->sym_sizes(), " and normalized_shape=", normalized_shape);
  }
  check_options(op, options);
}

void check_options(const char* op, const NormOptions& options) {
  const auto& [eps, weight_offset, cast_before_weight] = options;
  TORCH_CHECK_VALUE(!eps || (*eps >= 0 && std::isfinite(*eps)), op,
                    ": expected eps to be finite and not negative, but got ", *eps);
  TORCH_CHECK_VALUE(std::isfinite(weight_offset), op,
                    ": expected weight_offset to be finite, but got ", weight_offset);
}

SymIntArrayRef check_last_dim(const char* op, const Tensor& input, const OptionalTensor& weight,
                              const NormOptions& options) {
  TORCH_CHECK_VALUE(input.dim() > 0, op,
                    ": expected input with at least one dimension, but got a scalar");
  const SymIntArrayRef last = input.sym_sizes().slice(input.dim() - 1);
  check_norm(op, input, last, weight, options);
  return last;
}

void check_residual(const char* op, const Tensor& input, const Tensor& residual,
                    std::optional<at::ScalarType> added_type) {
  TORCH_CHECK_VALUE(input.dim() > 0, op,
                    ": expected input with at least one dimension, but got a scalar");
  TORCH_CHECK(same_sizes(residual.sym_sizes(), input.sym_sizes()), op,
              ": expected residual of input's shape ", input.sym_sizes(), ", but got ",
              residual.sym_sizes());
  const at::ScalarType type = added_type.value_or(input.scalar_type());
  const bool half = type == at::kHalf || type == at::kBFloat16;
  TORCH_CHECK(residual.scalar_type() == type || (half && residual.scalar_type() == at::kFloat), op,
              ": expected residual of ",
              type == input.scalar_type() ? "input's dtype " : "the norm's dtype ", type,
              half ? " or of Float" : "", ", but got ", residual.scalar_type());
}

void check_tensor(const char* op, const char* name, const Tensor& t, SymIntArrayRef shape,
                  std::optional<at::ScalarType> type) {
  TORCH_CHECK(same_sizes(t.sym_sizes(), shape), op, ": expected ", name, " of shape ", shape,
              ", but got ", t.sym_sizes());
  TORCH_CHECK(!type || t.scalar_type() == *type, op, ": expected ", name, " of dtype ", *type,
              ", but got ", t.scalar_type());
}

Rows check_written_rows(const char* op, const char* name, const Tensor& out, int64_t lead,
                        int64_t cols, const char* replaced_name, const Tensor& replaced) {
  const auto rows = rows_of(out, lead);
  TORCH_CHECK(rows, op, ": expected ", name,
              " with dense rows (the normalized dimensions contiguous), but got strides ",
              out.strides());
  TORCH_CHECK(
      !rows_overlap(*rows, cols), op, ": expected ", name,
      " with rows that do not overlap, but got strides ", out.strides(), " for shape ", out.sizes(),
      ": more than one element of the written-to tensor refers to a single memory location");
  TORCH_CHECK(are_same_memory(out, replaced) || are_apart(out, replaced, lead, cols), op, ": ",
              name, " partly overlaps ", replaced_name, "; expected ", name, " to be ",
              replaced_name, " itself or memory of its own");
  return *rows;
}

void check_apart(const char* op, const char* name, const Tensor& out, const char* other_name,
                 const Tensor& other, int64_t lead, int64_t cols) {
  TORCH_CHECK(are_apart(out, other, lead, cols), op, ": ", name, " and ", other_name,
              " share memory: some elements of the input tensor and the written-to tensor refer to "
              "a single location");
}

}  // namespace rmsnorm

// Every check of the op layer, in torch's words and exception types: which argument, what was
// expected, what came. They run before anything is allocated or written, and serve eager calls and
// compilers that trace alike. A size that a compiler does not know yet is taken for right, and
// checked when the compiled program runs.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "layout.h"
#include "options.h"

namespace rmsnorm {

using OptionalTensor = std::optional<at::Tensor>;

// What check_tensors() does with what is unusual.
void refuse_tensors(const c10::OperatorHandle& op, c10::ArrayRef<const at::Tensor*> tensors);

// Does the memory hold all of t? That of a tensor which a compiler traces never does.
bool fits_storage_by_strides(const at::Tensor& t);
inline bool fits_storage(const at::Tensor& t) {
  const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (!impl.storage_initialized() || impl.has_symbolic_sizes_strides()) return false;
  if (!impl.is_contiguous()) return fits_storage_by_strides(t);
  const int64_t bytes = (impl.storage_offset() + impl.numel()) * int64_t(impl.itemsize());
  return impl.numel() == 0 || bytes <= int64_t(impl.unsafe_storage().nbytes());
}

// Of every op, before its body: `tensors` are its arguments, nullptr for what is none. They are on
// one device and have memory, which FSDP and offloading free until a tensor is gathered again.
template <class Op>
void check_tensors(std::initializer_list<const at::Tensor*> tensors) {
  const at::Tensor* first = nullptr;
  for (const at::Tensor* t : tensors) {
    if (!t || !t->defined()) continue;
    if (!first) first = t;
    if (t->device() == first->device() && t->has_storage() && fits_storage(*t)) continue;
    return refuse_tensors(Op::handle(), tensors);
  }
}

// What every norm is asked, and what those of trailing dimensions are.
void check_options(const char* op, const NormOptions& options);
void check_norm(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                const OptionalTensor& weight, const NormOptions& options);

// Of the ops that normalize the last dimension; it is returned as a shape.
c10::SymIntArrayRef check_last_dim(const char* op, const at::Tensor& input,
                                   const OptionalTensor& weight, const NormOptions& options);

// The residual of a fused add: input's shape, and its dtype or, beside 16 bits, fp32. `added_type`:
// of what is added to it, where that is not input itself.
void check_residual(const char* op, const at::Tensor& input, const at::Tensor& residual,
                    std::optional<at::ScalarType> added_type = std::nullopt);

// Another tensor of a call: its shape and, if one is named, its dtype.
void check_tensor(const char* op, const char* name, const at::Tensor& t, c10::SymIntArrayRef shape,
                  std::optional<at::ScalarType> type = std::nullopt);

// One of the four that the kernels know.
void check_dtype(const char* op, const char* name, const at::Tensor& t);
[[noreturn]] void refuse_dtype(const char* op, const at::Tensor& t, const std::string& expected);

// The rows of a result that the caller owns. It may be what it replaces, or apart from it.
Rows check_written_rows(const char* op, const char* name, const at::Tensor& out, int64_t lead,
                        int64_t cols, const char* replaced_name, const at::Tensor& replaced);

// What is read while others write may not lie in the memory that is written; nor may two outputs
// share any. `lead` and `cols` as of are_apart().
void check_apart(const char* op, const char* name, const at::Tensor& out, const char* other_name,
                 const at::Tensor& other, int64_t lead = 0, int64_t cols = 0);

}  // namespace rmsnorm

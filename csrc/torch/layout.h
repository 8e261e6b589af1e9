// How tensors lie in memory: as rows that a kernel can walk, and beside each other.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <optional>

#include "../rmsnorm.h"

namespace rmsnorm {

inline Rows dense_rows(int64_t cols) { return Rows{1, {1}, {cols}}; }

// Where the rows of `t` start: its first `lead` dimensions, merged. nullopt: the other dimensions
// are not dense, or too many dimensions are left after merging; then a dense copy is needed.
std::optional<Rows> rows_of(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t lead);
inline std::optional<Rows> rows_of(const at::Tensor& t, int64_t lead) {
  return rows_of(t.sizes(), t.strides(), lead);
}

// `t` itself, borrowed, if its rows can be walked as they lie, else a dense copy. (To own what only
// Python holds costs two locks of the GIL: torch then counts Python's object too.)
struct Placed {
  c10::MaybeOwned<at::Tensor> tensor{};
  Rows rows;
};
Placed place(const at::Tensor& t, int64_t lead);

// A weight as the kernels read it; undefined if there is none.
inline c10::MaybeOwned<at::Tensor> dense(const std::optional<at::Tensor>& weight) {
  return weight ? weight->expect_contiguous() : c10::MaybeOwned<at::Tensor>();
}

// Might two rows share elements? Outputs may not: their rows are written at the same time.
bool rows_overlap(const Rows& rows, int64_t cols);

// Are a and b known to share no element? They may lie in the same memory if their rows alternate,
// as two slices of one fused projection; then `cols` columns after `lead` dimensions are a row. Of
// these slices one may be wider, as q beside k.
bool are_apart(const at::Tensor& a, const at::Tensor& b, int64_t lead = 0, int64_t cols = 0);

// The same elements in the same order at the same place.
bool are_same_memory(const at::Tensor& a, const at::Tensor& b);

// A new tensor on the device of `like`; while a compiler traces, one without memory.
at::Tensor allocate(c10::SymIntArrayRef shape, const at::Tensor& like, at::ScalarType type);

}  // namespace rmsnorm

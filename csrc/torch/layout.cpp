#include "layout.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <cstdlib>
#include <utility>

namespace rmsnorm {

using at::Tensor;

std::optional<Rows> rows_of(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t lead) {
  int64_t dense = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= lead; --d) {
    if (sizes[d] != 1 && strides[d] != dense) return std::nullopt;
    dense *= sizes[d];
  }
  Rows rows{1, {1}, {dense}};
  bool first = true;
  for (int64_t d = 0; d < lead; ++d) {
    if (sizes[d] == 1) continue;
    const int last = rows.ndim - 1;
    if (first) {
      rows.size[0] = sizes[d];
      rows.stride[0] = strides[d];
      first = false;
    } else if (rows.stride[last] == strides[d] * sizes[d]) {
      rows.size[last] *= sizes[d];
      rows.stride[last] = strides[d];
    } else if (rows.ndim < Rows::kMaxDims) {
      rows.size[rows.ndim] = sizes[d];
      rows.stride[rows.ndim] = strides[d];
      ++rows.ndim;
    } else {
      return std::nullopt;
    }
  }
  return rows;
}

Placed place(const Tensor& t, int64_t lead) {
  using MaybeOwned = c10::MaybeOwned<Tensor>;
  if (const auto rows = rows_of(t, lead)) return {MaybeOwned::borrowed(t), *rows};
  const Tensor dense = t.contiguous();
  return {MaybeOwned::owned(std::in_place, dense), *rows_of(dense, lead)};
}

// Each dimension has to step over all that those with smaller strides span.
bool rows_overlap(const Rows& rows, int64_t cols) {
  for (int d = 0; d < rows.ndim; ++d) {
    int64_t extent = cols;
    for (int e = 0; e < rows.ndim; ++e) {
      const bool smaller =
          rows.stride[e] < rows.stride[d] || (rows.stride[e] == rows.stride[d] && e < d);
      if (smaller) extent += (rows.size[e] - 1) * rows.stride[e];
    }
    if (rows.size[d] > 1 && rows.stride[d] < extent) return true;
  }
  return false;
}

namespace {

// The addresses that the elements of t lie in.
std::pair<const char*, const char*> span_of(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const char* const begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes() || a.element_size() != b.element_size()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

}  // namespace

bool are_same_memory(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && same_layout(a, b);
}

bool are_apart(const Tensor& a, const Tensor& b, int64_t lead, int64_t cols) {
  if (a.numel() == 0 || b.numel() == 0 || !a.is_alias_of(b)) return true;
  const auto [a_begin, a_end] = span_of(a);
  const auto [b_begin, b_end] = span_of(b);
  if (a_begin >= b_end || b_begin >= a_end) return true;
  const auto a_rows = rows_of(a, lead), b_rows = rows_of(b, lead);
  const int64_t size = static_cast<int64_t>(a.element_size());
  if (cols == 0 || !a_rows || !b_rows || size != b.element_size()) return false;
  if (a_rows->stride[0] != b_rows->stride[0]) return false;
  const auto extent = [&](const Rows& rows) {  // of what repeats every rows.stride[0] elements
    int64_t elements = cols;
    for (int d = 1; d < rows.ndim; ++d) elements += (rows.size[d] - 1) * rows.stride[d];
    return elements * size;
  };
  const int64_t period = a_rows->stride[0] * size;
  const int64_t phase = period > 0 ? (((a_begin - b_begin) % period) + period) % period : 0;
  return phase >= extent(*b_rows) && period - phase >= extent(*a_rows);
}

namespace {

// First-touch faults of 4 KiB pages cost more than the norm itself once malloc maps an output
// afresh on every call (from 32 MiB on, always). Advice only: without transparent huge pages
// nothing happens.
void advise_huge_pages(const Tensor& t) {
  constexpr int64_t kHugePage = 2 << 20, kLeastBytes = 16 << 20;
  const int64_t bytes = static_cast<int64_t>(t.nbytes());
  if (bytes < kLeastBytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// glibc maps a block afresh, or grows and trims the heap for it, until it has seen a larger one
// freed: then the kernel clears the pages of every output. It is shown the largest that it learns
// from (DEFAULT_MMAP_THRESHOLD_MAX), which no page is touched of. In half of all processes, as the
// heap happens to lie, an fp32 output of 1024x768 took 850 us instead of 210, and a fused addition
// of 256x16384 7.5 ms instead of 3.7.
void keep_freed_memory(int64_t bytes) {
  constexpr int64_t kLeastMapped = 128 << 10, kMostMapped = 32 << 20, kHeader = 64 << 10;
  if (bytes < kLeastMapped) return;
  static const bool shown = [] {
    void* volatile block = std::malloc(kMostMapped - kHeader);
    std::free(block);
    return true;
  }();
  static_cast<void>(shown);
}

}  // namespace

Tensor allocate(c10::SymIntArrayRef shape, const Tensor& like, at::ScalarType type) {
  if (!like.is_cpu()) return at::empty_symint(shape, like.options().dtype(type));
  // What at::empty comes to, without another trip through the dispatcher.
  Tensor t = at::detail::empty_cpu(C10_AS_INTARRAYREF_SLOW(shape), type);
  keep_freed_memory(static_cast<int64_t>(t.nbytes()));
  advise_huge_pages(t);
  return t;
}

}  // namespace rmsnorm

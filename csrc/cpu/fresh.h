// Results in memory that was allocated for the call, and may have no pages yet.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "kernels.h"

namespace rmsnorm::cpu {

// New memory of dense rows, whose pages may not be there before they are written.
class FreshRows {
 public:
  // Nothing is done where it is not large enough to have been mapped for this call.
  FreshRows(const void* data, int64_t rows, int64_t row_bytes)
      : data_(rows * row_bytes >= kMappedBytes ? reinterpret_cast<uintptr_t>(data) : 0),
        row_bytes_(row_bytes) {}

  int64_t rows_at_once() const {
    return data_ ? std::max<int64_t>(1, kMapAtOnce / row_bytes_) : INT64_MAX;
  }

  // Has the pages mapped that lie in these rows, unless the first of them is there: it is memory
  // that was in use before, then.
  void map(int64_t row_begin, int64_t row_end) const {
#ifdef MADV_POPULATE_WRITE
    if (!data_) return;
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (data_ + row_begin * row_bytes_ + page - 1) / page * page;
    const uintptr_t end = (data_ + row_end * row_bytes_) / page * page;
    unsigned char is_there = 0;
    const auto first = reinterpret_cast<void*>(begin);
    if (begin >= end || mincore(first, page, &is_there) || is_there & 1) return;
    madvise(first, end - begin, MADV_POPULATE_WRITE);  // if it fails, a first touch maps a page
#endif
  }

 private:
  uintptr_t data_;
  int64_t row_bytes_;
};

// run(begin, end) for units of so many rows, as many at a time as are mapped at once.
template <size_t n, class F>
void map_and_run(const FreshRows (&fresh)[n], int64_t unit, int64_t rows, int64_t begin,
                 int64_t end, F run) {
  int64_t at_once = INT64_MAX;
  for (const FreshRows& f : fresh) at_once = std::min(at_once, f.rows_at_once());
  const int64_t units = std::max<int64_t>(1, at_once / unit);
  for (int64_t i = begin, next; i < end; i = next) {
    next = units < end - i ? i + units : end;
    for (const FreshRows& f : fresh) f.map(i * unit, std::min(next * unit, rows));
    run(i, next);
  }
}

// run(row_begin, row_end).
template <class F>
void map_and_forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end, F run) {
  const void* const sum = p.addends.input ? p.x : nullptr;
  const FreshRows fresh[] = {{p.fresh ? p.y : nullptr, p.rows, p.cols * size_of(p.y_dtype)},
                             {p.fresh ? sum : nullptr, p.rows, p.cols * size_of(p.x_dtype)}};
  map_and_run(fresh, /*unit=*/1, p.rows, row_begin, row_end, run);
}

// run(block_begin, block_end), of blocks of so many rows; `other`: a result of dx's shape, if there
// is one.
template <class F>
void map_and_backward(const RmsNormBackward& p, int64_t block_rows, int64_t block_begin,
                      int64_t block_end, F run, const void* other = nullptr,
                      DType other_dtype = DType::kFloat32) {
  const FreshRows fresh[] = {{p.fresh ? p.dx : nullptr, p.rows, p.cols * size_of(p.x_dtype)},
                             {p.fresh ? other : nullptr, p.rows, p.cols * size_of(other_dtype)}};
  map_and_run(fresh, block_rows, p.rows, block_begin, block_end, run);
}

}  // namespace rmsnorm::cpu

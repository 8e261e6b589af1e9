// How the threads of a block share rows, and the columns of one.
#pragma once
#include <cstdint>

#include "tuning.h"
#include "vec.cuh"

namespace rmsnorm::cuda {

// The blocks of a launch, among which its rows are shared out.
struct AllBlocks {
  static __device__ unsigned index() { return blockIdx.x; }
  static __device__ unsigned count() { return gridDim.x; }
};

// Rows in registers: a thread has kVectors chunks, of kElems elements each, of kRows rows at a
// time.
template <typename Index, int kRows, int kVectors, int kElems, typename Blocks = AllBlocks>
struct RowGroup {
  const int64_t& rows;  // where the arguments are: a copy would take registers
  const int cols;
  // Where a thread has one row at a time, which then is of whole warps, these may leave the loop
  // one by one. Else all of a block stay in it together.
  const bool warps_leave;
  const int lane = threadIdx.x, lanes = blockDim.x;
  const int slot = warps_leave ? 0 : threadIdx.y;
  // The first of the kRows rows, which are a stride apart.
  Index first = Index{Blocks::index()} * blockDim.y + (warps_leave ? threadIdx.y : 0);

  __device__ Index stride() const { return Index{Blocks::count()} * blockDim.y; }
  __device__ bool any() const { return first < Index(rows); }
  __device__ void advance() { first += kRows * stride(); }

  // f(r, row) for each of the thread's rows that there are.
  template <typename F>
  __device__ void each_row(const F& f) const {
    unrolled<kRows>([&](int r) {
      const Index row = first + r * stride() + slot;
      if (row < Index(rows)) f(r, row);
    });
  }

  // f(r, row, is_there) for the same or, of several, for those too that are not there: branches
  // would cost more than a few instructions on zeros.
  template <typename F>
  __device__ void each_row_or_none(const F& f) const {
    if constexpr (kRows == 1) {
      each_row([&](int r, Index row) { f(r, row, true); });
    } else {
      unrolled<kRows>([&](int r) {
        const Index row = first + r * stride() + slot;
        f(r, row, row < Index(rows));
      });
    }
  }

  // f(k, column, count) for each chunk of a row. The count of the last is beyond its elements.
  template <typename F>
  __device__ void each_chunk(const F& f, bool is_there = true) const {
    unrolled<kVectors>([&](int k) {
      const int col = (k * lanes + recomputed(lane)) * kElems;
      f(k, col, is_there ? cols - col : 0);
    });
  }
};

// A longer row: the columns that a block has of it, counted from `begin`. They are worked on in
// tiles of kVectors chunks per thread. The last chunk may be incomplete.
template <typename Index, int kVectors, int kElems>
struct Slice {
  const int64_t begin, end;
  const Index cols = static_cast<Index>(max(end - begin, int64_t{0}));
  const int lanes = blockDim.x, lane = threadIdx.x;
  const Index chunks = (cols + kElems - 1) / kElems;
  const Index tile = lanes * kVectors;

  __device__ Index column(Index chunk) const { return chunk * kElems; }
  __device__ int count(Index chunk) const {
    return static_cast<int>(min(cols - column(chunk), Index{kElems}));
  }

  // f(k, chunk) for each of the thread's chunks in a tile; those beyond the slice too.
  template <typename F>
  __device__ void each_index(Index first, const F& f) const {
    unrolled<kVectors>([&](int k) { f(k, first + k * lanes + lane); });
  }

  // f(k, column, count) for the same; beyond the slice the count is 0 or less.
  template <typename F>
  __device__ void each_chunk(Index first, const F& f) const {
    each_index(first, [&](int k, Index chunk) { f(k, column(chunk), count(chunk)); });
  }

  // f(chunk) for each of the thread's chunks in the slice, one at a time.
  template <typename F>
  __device__ void each_index(const F& f) const {
#pragma unroll 1
    for (Index chunk = lane; chunk < chunks; chunk += lanes) f(chunk);
  }
};

}  // namespace rmsnorm::cuda

// Which kernel a row length gets, and how it is laid over the machine. Pure host functions: no GPU is
// needed to call them. A row's reduction tree follows from `vectors`, `lanes` and `cluster`, and those follow from
// the row length, the dtypes and the kind of device; the number of rows only decides the grid.
#pragma once
#include <cstddef>

#include "../rmsnorm.h"

namespace rmsnorm::cuda {

inline int size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// Elements of one 16-byte vector of x: what a thread handles at a time.
inline int vector_elems(DType x) { return 16 / size_of(x); }

// The type in which the weight (or dy) stays in registers: that of x, or fp32 for every other dtype.
// It halves the number of kernels, and only the odd pairs (fp16 beside bf16) hold more than they need.
inline DType held_dtype(DType x, DType other) { return other == x ? x : DType::kFloat32; }

constexpr int kWarp = 32;
// Threads of a row in registers: of such blocks two or three fit a multiprocessor.
constexpr int kMaxThreads = 256;
// Those of a block's slice of a longer row. Two such blocks fit: 64 and 48 KiB are then in flight, above the 20 to 50 KiB
// that bandwidth times latency asks for on H100 and B200.
constexpr int kForwardSliceThreads = 512;
constexpr int kBackwardSliceThreads = 384;
// Registers that a thread may take; tests/test_native.py compares with what the compiler took.
constexpr int kForwardRegisters = 80;
constexpr int kForwardSliceRegisters = 64;
constexpr int kForwardTwiceRegisters = 128;  // where a row is read twice, or put into 8 bits
constexpr int backward_registers(bool mixed) { return mixed ? 120 : 80; }  // mixed: fp32 dy or weight beside 16-bit x
constexpr int kBackwardSliceRegisters = 80;
constexpr int kRegisterFile = 1 << 16;
// Threads of a block that works on several short rows: small, so that blocks come and go evenly.
constexpr int kForwardThreads = 128;
// More in the backward, where each block leaves a row of partial sums behind.
constexpr int kBackwardThreads = 256;
// Vectors per thread: so many 16-byte accesses are in flight. Rows of one or two vectors per thread are taken four or
// two at a time to the same end. The backward has two such streams and sums in registers.
constexpr int kForwardVectors = 4;
constexpr int kBackwardVectors = 2;
// Longer rows are shared by the least number of blocks (a cluster, from compute capability 9.0 on) that leaves each a
// slice of so many bytes in shared memory, of which three fit a multiprocessor. The greatest cluster is what every
// such device has.
constexpr int kFirstClusters = 90;
constexpr int kMaxCluster = 8;
constexpr int64_t kSliceBytes = 64 << 10;
// Of the shared memory: what the kernels have beside the slice, and the system takes.
constexpr int64_t kOtherSharedBytes = 4 << 10;
// How many times a grid fills the machine. Four in the forward: blocks that end early make room for others, while the
// weight is loaded once per block. One in the backward, since blocks cost partial sums. Not measured on a GPU yet.
constexpr int kForwardWaves = 4;
// Clusters do not cross these: parts of the machine with at least so many multiprocessors.
constexpr int kGpcMultiprocessors = 16;
// Rows of a short launch are spread until each group of lanes has this many: one row costs as many bytes to
// read and write as one row of fp32 partial sums.
constexpr int kBackwardMinRows = 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int ceil_pow2(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Blocks for `items` of equal work, at most `limit`, so that all have the same number of items but the last.
inline int64_t even_blocks(int64_t items, int64_t limit) {
  limit = limit < 1 ? 1 : limit < items ? limit : items;
  return ceil_div(items, ceil_div(items, limit));
}

// block_threads: of several short rows; slice_threads: at most, of a slice; kept_bytes: what a vector takes of shared memory.
inline Plan plan_row(int64_t cols, DType x, int max_vectors, int block_threads, int slice_threads, int64_t kept_bytes,
                     const Device& device) {
  const int elems = vector_elems(x);
  const int64_t n = ceil_div(cols, elems);
  Plan plan{};
  plan.cluster = 1;
  plan.slice = cols;
  if (n <= int64_t{kMaxThreads} * max_vectors) {
    plan.keep = Keep::kRegisters;
    plan.vectors = n <= kWarp ? 1 : n <= 2 * kWarp ? 2 : max_vectors;
    plan.lanes = n <= kWarp ? ceil_pow2(n) : kWarp * static_cast<int>(ceil_div(n, kWarp * plan.vectors));
    plan.threads = plan.lanes * (plan.lanes < block_threads ? block_threads / plan.lanes : 1);
    return plan;
  }
  plan.vectors = max_vectors;
  plan.lanes = plan.threads = slice_threads;
  const int most = device.arch >= kFirstClusters ? kMaxCluster : 1;
  const auto slice = [&](int cluster) { return ceil_div(ceil_div(n, cluster), kWarp) * kWarp; };
  int cluster = 1;
  while (cluster < most && slice(cluster) * kept_bytes > kSliceBytes) cluster *= 2;
  plan.keep = slice(cluster) * kept_bytes <= device.shared_bytes - kOtherSharedBytes ? Keep::kShared : Keep::kNowhere;
  if (plan.keep == Keep::kNowhere) return plan;
  plan.cluster = cluster;
  plan.slice = slice(cluster) * elems;
  plan.shared_bytes = slice(cluster) * kept_bytes;
  // As few threads as need no more tiles: all of them have work in each.
  const int64_t per_thread = ceil_div(slice(cluster), slice_threads * max_vectors) * max_vectors;
  plan.lanes = plan.threads = kWarp * static_cast<int>(ceil_div(slice(cluster), kWarp * per_thread));
  return plan;
}

// Blocks that a multiprocessor holds at a time.
inline int64_t resident_blocks(const Plan& plan, const Device& device) {
  const int64_t by_registers = kRegisterFile / (plan.registers * plan.threads);
  const int64_t by_shared = device.shared_bytes / (plan.shared_bytes + kOtherSharedBytes);
  const int64_t blocks = plan.shared_bytes > 0 && by_shared < by_registers ? by_shared : by_registers;
  return blocks < 1 ? 1 : blocks;
}

// Rows (or groups of short rows) that the machine works on at a time.
inline int64_t resident_rows(const Plan& plan, const Device& device) {
  if (plan.cluster == 1) return device.multiprocessors * plan.resident;
  const int64_t rows = device.multiprocessors / kGpcMultiprocessors * (kGpcMultiprocessors * plan.resident / plan.cluster);
  return rows < 1 ? 1 : rows;
}

inline Plan plan_forward(int64_t rows, int64_t cols, DType x, const Device& device, bool quant = false) {
  Plan plan = plan_row(cols, x, kForwardVectors, kForwardThreads, kForwardSliceThreads, 16, device);
  if (plan.lanes > kWarp) plan.threads = plan.lanes;  // one row: its threads may meet at a barrier
  plan.registers = quant || plan.keep == Keep::kNowhere ? kForwardTwiceRegisters
                   : plan.keep == Keep::kShared         ? kForwardSliceRegisters
                                                        : kForwardRegisters;
  plan.resident = resident_blocks(plan, device);
  // Threads with one or two vectors of a row take four or two rows at a time: that many waves fewer.
  const int waves = kForwardWaves * plan.vectors / kForwardVectors;
  plan.blocks = even_blocks(ceil_div(rows, plan.threads / plan.lanes), resident_rows(plan, device) * waves);
  plan.blocks *= plan.cluster;
  return plan;
}

// blocks / cluster: also the number of rows of partial sums.
inline Plan plan_backward(int64_t rows, int64_t cols, DType dy, DType x, DType w, const Device& device) {
  const int elems = vector_elems(x);
  const int64_t kept_bytes = 16 + elems * (size_of(held_dtype(x, dy)) + int64_t{sizeof(float)});  // and a sum for dweight
  Plan plan = plan_row(cols, x, kBackwardVectors, kBackwardThreads, kBackwardSliceThreads, kept_bytes, device);
  const bool mixed = held_dtype(x, dy) != x || held_dtype(x, w) != x;
  plan.registers = plan.keep == Keep::kRegisters ? backward_registers(mixed) : kBackwardSliceRegisters;
  plan.resident = resident_blocks(plan, device);
  const int64_t limit = resident_rows(plan, device);
  const int64_t groups = ceil_div(rows, plan.threads / plan.lanes);
  // Rows that are read twice leave their partial sums to the second pass.
  const int64_t spread = plan.keep == Keep::kNowhere ? groups : ceil_div(groups, kBackwardMinRows);
  plan.blocks = even_blocks(groups, spread < limit ? spread : limit) * plan.cluster;
  return plan;
}

// The second pass over rows that are read twice: a block owns a strip of columns and a range of rows.
struct StripPlan {
  int64_t strips;
  int64_t blocks;  // ranges of rows: also the number of rows of partial sums
};
constexpr int kStripThreads = 256;
constexpr int kStripRows = 4;  // rows taken at a time: four vectors of x and of dy in flight per thread

inline StripPlan plan_strips(int64_t rows, int64_t cols, DType x, const Device& device) {
  StripPlan plan;
  plan.strips = ceil_div(cols, kStripThreads * vector_elems(x));
  const int64_t limit = ceil_div(int64_t{device.multiprocessors} * (kRegisterFile / (backward_registers(true) * kStripThreads)), plan.strips);
  plan.blocks = even_blocks(ceil_div(rows, kStripRows), limit);
  return plan;
}

}  // namespace rmsnorm::cuda

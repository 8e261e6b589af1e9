// Which kernel a row length gets, and how it is laid over the machine. Pure host functions: no GPU is
// needed to call them. A row's reduction tree follows from `vectors` and `lanes`, and those follow from
// the row length and the dtypes alone; the number of rows and the device only decide the grid.
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

struct Plan {
  bool in_registers;  // the row is held in registers and read once; otherwise it is read twice
  int vectors;        // vectors of a row (of a tile of it) that one thread holds at a time
  int lanes;          // threads of a row: a power of two up to 32, beyond a multiple of 32
  int threads;        // of a block: lanes times the rows it works on at a time
  int64_t blocks;
};

constexpr int kWarp = 32;
// 80 registers per thread: at 1024 threads and 64 registers, some kernels on some architectures spill a few.
constexpr int kMaxThreads = 768;
// 128 where those are too few: where fp32 weights (or dy) stand beside 16-bit x, and in
// the backward for all 16-bit x, whose sums for dweight take twice the registers of x.
constexpr int kMaxThreadsWide = 512;
// Threads of a block that works on several short rows: small, so that blocks come and go evenly.
constexpr int kForwardThreads = 128;
// More in the backward, where each block leaves a row of partial sums behind.
constexpr int kBackwardThreads = 256;
// Vectors per thread: 4 x 16 bytes are in flight per thread, 48 KiB per SM at 768 threads, about the 20 to
// 50 KiB that bandwidth times latency asks for on H100 and B200. Rows of one or two vectors per thread are
// taken four or two at a time to the same end. The backward has two such streams and sums in registers.
constexpr int kForwardVectors = 4;
constexpr int kBackwardVectors = 2;
// Threads of a row that does not fit registers.
constexpr int kLongThreads = 512;
// Threads of an SM that a persistent grid counts on, by the registers that the kernels take: up to 80 (92 beside
// fp32 weights) in the forward, up to 80 and 110 in the backward of fp32 and 16-bit x. And how many times the grid
// fills the machine. Four in the forward: blocks that end early make room for others, while the weight is loaded
// once per block. One in the backward, since blocks cost partial sums. Not measured on a GPU yet.
constexpr int kForwardResident = 768;
constexpr int kForwardWaves = 4;
constexpr int kBackwardResident = 768;
constexpr int kBackwardResidentHalf = 512;
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

inline Plan plan_lanes(int64_t cols, DType x, int max_vectors, int max_lanes, int block_threads) {
  const int64_t n = ceil_div(cols, vector_elems(x));
  Plan plan{};
  plan.in_registers = n <= int64_t{max_lanes} * max_vectors;
  if (!plan.in_registers) {
    plan.vectors = max_vectors;
    plan.lanes = plan.threads = kLongThreads;
    return plan;
  }
  plan.vectors = n <= kWarp ? 1 : n <= 2 * kWarp ? 2 : max_vectors;
  plan.lanes = n <= kWarp ? ceil_pow2(n) : kWarp * static_cast<int>(ceil_div(n, kWarp * plan.vectors));
  plan.threads = plan.lanes * (plan.lanes < block_threads ? block_threads / plan.lanes : 1);
  return plan;
}

inline Plan plan_forward(int64_t rows, int64_t cols, DType x, DType w, int sms) {
  const bool mixed = size_of(held_dtype(x, w)) > size_of(x);
  Plan plan = plan_lanes(cols, x, kForwardVectors, mixed ? kMaxThreadsWide : kMaxThreads, kForwardThreads);
  if (plan.lanes > kWarp) plan.threads = plan.lanes;  // one row: its threads may meet at a barrier
  const int64_t resident = kForwardResident > plan.threads ? kForwardResident / plan.threads : 1;
  // Threads with one or two vectors of a row take four or two rows at a time: that many waves fewer.
  const int waves = kForwardWaves * plan.vectors / kForwardVectors;
  plan.blocks = even_blocks(ceil_div(rows, plan.threads / plan.lanes), sms * resident * waves);
  return plan;
}

// blocks: also the number of rows of partial sums.
inline Plan plan_backward(int64_t rows, int64_t cols, DType dy, DType x, DType w, int sms) {
  const int max_threads = x == DType::kFloat32 ? kMaxThreads : kMaxThreadsWide;
  Plan plan = plan_lanes(cols, x, kBackwardVectors, max_threads, kBackwardThreads);
  const int fit = x == DType::kFloat32 ? kBackwardResident : kBackwardResidentHalf;
  const int64_t resident = fit > plan.threads ? fit / plan.threads : 1;
  const int64_t groups = ceil_div(rows, plan.threads / plan.lanes);
  // Rows that are read twice leave their partial sums to the second pass.
  const int64_t spread = plan.in_registers ? ceil_div(groups, kBackwardMinRows) : groups;
  plan.blocks = even_blocks(groups, spread < sms * resident ? spread : sms * resident);
  return plan;
}

// The second pass over rows that do not fit registers: a block owns a strip of columns and a range of rows.
struct StripPlan {
  int64_t strips;
  int64_t blocks;  // ranges of rows: also the number of rows of partial sums
};
constexpr int kStripThreads = 256;
constexpr int kStripRows = 4;  // rows taken at a time: four vectors of x and of dy in flight per thread

inline StripPlan plan_strips(int64_t rows, int64_t cols, DType x, int sms) {
  StripPlan plan;
  plan.strips = ceil_div(cols, kStripThreads * vector_elems(x));
  const int64_t limit = ceil_div(int64_t{sms} * (kBackwardResidentHalf / kStripThreads), plan.strips);
  plan.blocks = even_blocks(ceil_div(rows, kStripRows), limit);
  return plan;
}

}  // namespace rmsnorm::cuda

// The numbers that the kernels, their launch bounds and the planner (plan.h) go by. Python gets
// them from the plans and from cuda::kernel_limits(). They are reckoned, as each comment says: none
// has been measured on a GPU yet.
#pragma once
#include "../rmsnorm.h"

namespace rmsnorm::cuda {

constexpr int kWarp = 32;
constexpr int kRegisterFile = 1 << 16;  // registers of a multiprocessor, on every architecture

// Vectors per thread: so many 16-byte accesses are in flight. Rows of one or two vectors per thread
// are taken four or two at a time to the same end. The backward has two such streams, and sums in
// registers. Kernels are instantiated for these, so they are the same on every architecture.
constexpr int kForwardVectors = 4;
constexpr int kBackwardVectors = 2;
constexpr int kBytesInFlight = 64;  // of a thread: four vectors of x, or two of x and two of dy
static_assert(16 * kForwardVectors == kBytesInFlight &&
              2 * 16 * kBackwardVectors == kBytesInFlight);

// With a gate there is a stream more: 64 and 96 bytes of a thread are in flight. In shared memory a
// row of the backward takes five times its bytes: of slices of this size two fit a multiprocessor.
constexpr int kGatedVectors = 2;
constexpr int kGatedSliceBytes = 96 << 10;

// Rows that are read twice: how many the second pass of the backward takes at a time.
constexpr int kStripRows = 4;  // four vectors of x and of dy in flight per thread

// Of the shared memory: what the kernels have beside the slice, and the system takes.
constexpr int64_t kOtherSharedBytes = 4 << 10;

// The kernels of rows. Those of a family are in the order of Keep.
enum KernelIndex {
  kForwardRows,
  kForwardSharedRows,
  kForwardLongRows,
  kQuantRows,
  kQuantSharedRows,
  kQuantLongRows,
  kBackwardRows,
  kBackwardSharedRows,
  kBackwardLongStats,
  kBackwardLongStrips,
  kRopeRows,
  kRopeAnyRows,
  kRopeBackwardRows,
  kRopeBackwardAnyRows,
  kGatedRows,
  kGatedSharedRows,
  kGatedAnyRows,
  kGatedBackwardRows,
  kGatedBackwardSharedRows,
  kGatedBackwardAnyRows,
  kGatedQuantRows,
  kGatedQuantSharedRows,
  kGatedQuantAnyRows,
  kQuantizeRows,
  kSandwichRows,
  kSandwichSharedRows,
  kSandwichAnyRows,
};

// Rows in registers: two or three blocks of the most threads fit a multiprocessor. Rows in shared
// memory: two blocks fit in the forward, 64 KiB are then in flight, above the 20 to 50 KiB that
// bandwidth times latency asks for on H100 and B200. In the backward a block has so many threads
// where it is alone, and half of them where two fit. With rotary embedding a thread has two vectors
// of x: six blocks of rope_rows have 24 KiB in flight, five of its second form 20 KiB. With a gate
// two or three blocks fit too.
constexpr KernelLimits kLimits[] = {
    // kernel, threads, registers, and those of launches that take more: with a residual or not
    // plain (forward), with dy of another dtype (backward), with pairs of several lanes (rope)
    {"forward_rows", 256, 80, 128},
    {"forward_shared_rows", 512, 64, 128},
    {"forward_long_rows", 512, 128, 128},
    {"quant_rows", 256, 128, 128},
    {"quant_shared_rows", 512, 64, 128},
    {"quant_long_rows", 512, 128, 128},
    {"backward_rows", 256, 80, 120},
    {"backward_shared_rows", 768, 80, 80},
    {"backward_long_stats", 384, 80, 80},
    {"backward_long_strips", 256, 120, 120},
    {"rope_rows", 128, 80, 96},
    {"rope_any_rows", 512, 128, 128},
    {"rope_backward_rows", 256, 128, 128},
    {"rope_backward_any_rows", 256, 128, 128},
    {"gated_rows", 256, 80, 80},
    {"gated_shared_rows", 384, 80, 80},
    {"gated_any_rows", 512, 128, 128},
    {"gated_backward_rows", 256, 128, 128},
    {"gated_backward_shared_rows", 768, 80, 80},
    {"gated_backward_any_rows", 768, 80, 80},
    {"gated_quant_rows", 256, 80, 80},
    {"gated_quant_shared_rows", 384, 80, 80},
    {"gated_quant_any_rows", 512, 128, 128},
    {"quantize_rows", 512, 64, 64},
    {"sandwich_rows", 256, 128, 128},
    {"sandwich_shared_rows", 512, 64, 64},
    {"sandwich_any_rows", 512, 128, 128},
    {nullptr, 0, 0, 0},
};

struct Tuning {
  int arch;  // 90 is compute capability 9.0: from this one on
  // Threads of a block that works on several short rows. Few in the forward, so that blocks come
  // and go evenly; more in the backward, where each block leaves a row of partial sums behind.
  int forward_block_threads, backward_block_threads;
  // How many times a grid fills the machine. Four in the forward: blocks that end early make room
  // for others, while the weight is loaded once per block. (Once in the backward: blocks cost
  // partial sums.)
  int forward_waves;
  // Rows of a short launch are spread until each group of lanes has this many: one row costs as
  // many bytes to read and write as one row of fp32 partial sums.
  int backward_min_rows;
  // Longer rows are shared by the least number of blocks (a cluster) that leaves each a slice of so
  // many bytes in shared memory, of which three fit a multiprocessor. The greatest cluster is what
  // every device with clusters has.
  int slice_bytes;
  int max_cluster;
  int max_resident;  // blocks that a multiprocessor holds, whatever they ask for
  // Clusters do not cross these: parts of the machine with at least so many multiprocessors. For
  // machines that were not asked how many clusters they hold.
  int gpc_multiprocessors;
  const KernelLimits* limits;  // by KernelIndex
};

// An architecture goes by the last line that is not above it.
constexpr Tuning kTuning[] = {
    // arch, threads of short rows, waves, rows, slice, cluster, resident, multiprocessors, limits
    {75, 128, 256, 4, 2, 64 << 10, 1, 16, 16, kLimits},
    {90, 128, 256, 4, 2, 64 << 10, 8, 32, 16, kLimits},
};

constexpr const Tuning& tuning_of(int arch) {
  const Tuning* tuning = kTuning;
  for (const Tuning& next : kTuning) {
    if (next.arch <= arch) tuning = &next;
  }
  return *tuning;
}

#ifdef __CUDA_ARCH__
constexpr Tuning kTuned = tuning_of(__CUDA_ARCH__ / 10);
#else
constexpr Tuning kTuned = kTuning[0];  // not looked at
#endif

constexpr int blocks_of(const KernelLimits& limits, bool mixed, int threads) {
  return kRegisterFile / (threads * (mixed ? limits.mixed_registers : limits.registers));
}
constexpr int blocks_of(const KernelLimits& limits, bool mixed) {
  return blocks_of(limits, mixed, limits.threads);
}
template <KernelIndex kKernel>
constexpr int kThreads = kTuned.limits[kKernel].threads;
// The head of a kernel, with its launch bounds.
#define ROW_KERNEL(kernel, mixed) \
  __global__ void __launch_bounds__(kThreads<kernel>, blocks_of(kTuned.limits[kernel], mixed))

}  // namespace rmsnorm::cuda

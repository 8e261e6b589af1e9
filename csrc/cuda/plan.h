// Which kernel a row length gets, and how it is laid over the machine. Pure host functions: no GPU
// is needed to call them. A row's reduction tree follows from `vectors`, `lanes` and `cluster`, and
// those follow from the row length, the dtypes and the kind of device; the number of rows only
// decides the grid.
#pragma once
#include <algorithm>
#include <cstddef>
#ifdef RMSNORM_TUNING
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#endif

#include "../rmsnorm.h"
#include "tuning.h"

namespace rmsnorm::cuda {

#ifdef RMSNORM_TUNING
// With the numbers that RMSNORM_TUNE names ("forward_waves=8,max_resident=2"): for the builds of
// benchmarks/tune.py. The kernels are compiled for those of tuning_of(), which they are not to
// exceed.
inline Tuning tuning_for(const Device& device) {
  Tuning t = tuning_of(device.arch);
  const char* const set = std::getenv("RMSNORM_TUNE");
  std::istringstream items(set != nullptr ? set : "");
  for (std::string name, value;
       std::getline(items, name, '=') && std::getline(items, value, ',');) {
    int* const number = name == "forward_block_threads"    ? &t.forward_block_threads
                        : name == "backward_block_threads" ? &t.backward_block_threads
                        : name == "forward_waves"          ? &t.forward_waves
                        : name == "backward_min_rows"      ? &t.backward_min_rows
                        : name == "slice_bytes"            ? &t.slice_bytes
                        : name == "max_cluster"            ? &t.max_cluster
                        : name == "max_resident"           ? &t.max_resident
                                                           : nullptr;
    if (number == nullptr) throw std::runtime_error("RMSNORM_TUNE: no number is named " + name);
    *number = std::stoi(value);
  }
  return t;
}
#else
inline const Tuning& tuning_for(const Device& device) { return tuning_of(device.arch); }
#endif

constexpr RMSNORM_HOST_DEVICE bool is_double(DType t) { return t == DType::kFloat64; }
inline int size_of(DType t) { return is_double(t) ? 8 : t == DType::kFloat32 ? 4 : 2; }

// Elements of one 16-byte vector of x: what a thread handles at a time.
inline int vector_elems(DType x) { return 16 / size_of(x); }

// The type in which dy stays in registers: that of x, or fp32 for every other dtype. It halves the
// number of kernels, and only the odd pairs (fp16 beside bf16) hold more than they need.
inline DType held_dtype(DType x, DType other) { return other == x ? x : DType::kFloat32; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `items` of equal work, at most `limit`, so that all have the same number of items but
// the last.
inline int64_t even_blocks(int64_t items, int64_t limit) {
  return ceil_div(items, ceil_div(items, std::clamp(limit, int64_t{1}, items)));
}

// As few threads as need no more tiles of so many chunks: all of them have work in each.
inline Plan share_slice(Plan plan, int64_t chunks, int threads, int vectors) {
  const int64_t per_thread = ceil_div(chunks, threads * vectors) * vectors;
  plan.lanes = plan.threads = kWarp * static_cast<int>(ceil_div(chunks, kWarp * per_thread));
  return plan;
}

// limits: of the family's kernels, by Keep. block_threads: of several short rows. kept_bytes: what
// a vector takes of shared memory.
inline Plan plan_row(int64_t cols, DType x, int max_vectors, const KernelLimits* limits,
                     int block_threads, int64_t kept_bytes, int64_t slice_bytes,
                     const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const int elems = vector_elems(x);
  const int64_t n = ceil_div(cols, elems);
  Plan plan{};
  plan.kernel = limits[0].kernel;
  plan.bytes_in_flight = kBytesInFlight;
  plan.cluster = 1;
  plan.slice = cols;
  if (n <= int64_t{limits[0].threads} * max_vectors) {
    plan.vectors = n <= kWarp ? 1 : n <= 2 * kWarp ? 2 : max_vectors;
    plan.lanes = kWarp * static_cast<int>(ceil_div(n, kWarp * plan.vectors));
    while (plan.lanes / 2 >= n) plan.lanes /= 2;
    plan.threads = plan.lanes * std::max(block_threads / plan.lanes, 1);
    return plan;
  }
  const auto slice = [&](int cluster) { return ceil_div(ceil_div(n, cluster), kWarp) * kWarp; };
  int cluster = 1;
  while (cluster < tuning.max_cluster && slice(cluster) * kept_bytes > slice_bytes) cluster *= 2;
  plan.vectors = max_vectors;
  plan.keep = slice(cluster) * kept_bytes <= device.shared_bytes - kOtherSharedBytes
                  ? Keep::kShared
                  : Keep::kNowhere;
  const KernelLimits& kernel = limits[static_cast<int>(plan.keep)];
  plan.kernel = kernel.kernel;
  plan.lanes = plan.threads = kernel.threads;
  if (plan.keep == Keep::kNowhere) return plan;
  plan.cluster = cluster;
  plan.slice = slice(cluster) * elems;
  plan.shared_bytes = slice(cluster) * kept_bytes;
  return share_slice(plan, slice(cluster), kernel.threads, max_vectors);
}

// Blocks that a multiprocessor holds at a time.
inline int64_t resident_blocks(const Plan& plan, const Device& device) {
  const int64_t by_registers = kRegisterFile / (plan.registers * plan.threads);
  const int64_t by_shared = device.shared_bytes / (plan.shared_bytes + kOtherSharedBytes);
  const int64_t most = tuning_for(device).max_resident;
  return std::max(std::min({by_shared, by_registers, most}), int64_t{1});
}

// Rows (or groups of short rows) that the machine works on at a time.
inline int64_t resident_rows(const Plan& plan, const Device& device) {
  if (plan.cluster == 1) return device.multiprocessors * plan.resident;
  const int size = plan.cluster == 2 ? 0 : plan.cluster == 4 ? 1 : 2;
  const int64_t room = std::min(plan.resident, int64_t{kClusterCounts / 3});
  if (const int asked = device.clusters[3 * (room - 1) + size]) return asked;
  const int gpc = tuning_of(device.arch).gpc_multiprocessors;
  return std::max(device.multiprocessors / gpc * (gpc * plan.resident / plan.cluster), int64_t{1});
}

// first: of the family's kernels. wide: with a residual, or not plain (Form in launch.h): more
// registers.
inline Plan plan_norm(int64_t rows, int64_t cols, DType x, const Device& device, KernelIndex first,
                      bool wide) {
  const Tuning& tuning = tuning_for(device);
  const KernelLimits* const limits = tuning.limits + first;
  Plan plan = plan_row(cols, x, kForwardVectors, limits, tuning.forward_block_threads, 16,
                       tuning.slice_bytes, device);
  if (plan.lanes > kWarp) plan.threads = plan.lanes;  // one row: its threads may meet at a barrier
  const KernelLimits& kernel = limits[static_cast<int>(plan.keep)];
  plan.registers = wide ? kernel.mixed_registers : kernel.registers;
  plan.resident = resident_blocks(plan, device);
  // Threads with one or two vectors of a row take four or two rows at a time: fewer waves.
  const int waves = std::max(tuning.forward_waves * plan.vectors / kForwardVectors, 1);
  const int64_t resident = resident_rows(plan, device), slots = plan.threads / plan.lanes;
  const int64_t spread = ceil_div(rows, slots);  // a thread has one row
  const int64_t groups = ceil_div(spread, kForwardVectors / plan.vectors);
  plan.blocks =
      (spread <= resident ? spread : even_blocks(groups, resident * waves)) * plan.cluster;
  return plan;
}

inline Plan plan_forward(int64_t rows, int64_t cols, DType x, const Device& device,
                         bool wide = false, bool quant = false) {
  return plan_norm(rows, cols, x, device, quant ? kQuantRows : kForwardRows, wide);
}

// Rows are laid out as those of the norm: one has the same bits.
inline Plan plan_sandwich(int64_t rows, int64_t cols, DType x, const Device& device) {
  return plan_norm(rows, cols, x, device, kSandwichRows, false);
}

// The same of a launch that is not plain, of the kernel that reads a row more than once.
template <typename P>
P of_any_rows(P plan, const KernelLimits& kernel, const Device& device) {
  plan.kernel = kernel.kernel;
  plan.keep = Keep::kNowhere;
  plan.registers = kernel.registers;
  plan.shared_bytes = 0;
  plan.resident = resident_blocks(plan, device);
  return plan;
}

// Of shared memory, for a vector of x: x, dy and the sums for dweight.
inline int64_t backward_kept_bytes(DType dy, DType x) {
  return 16 + vector_elems(x) * (size_of(held_dtype(x, dy)) + int64_t{sizeof(float)});
}

// Of a slice in shared memory: half the threads where two blocks fit, and if `copied` the next
// row's too where there is room, so many bytes of each chunk.
inline void keep_next(Plan& plan, int64_t chunks, int64_t chunk_bytes, int threads, int vectors,
                      bool copied, const Device& device) {
  const auto fit = [&](int64_t blocks, int64_t bytes) {
    return blocks * (bytes + kOtherSharedBytes) <= device.shared_bytes;
  };
  const bool two = fit(2, plan.shared_bytes);
  if (two) plan = share_slice(plan, chunks, threads / 2, vectors);
  const int64_t bytes = plan.shared_bytes + chunks * chunk_bytes;
  if (copied && fit(two ? 2 : 1, bytes)) plan.shared_bytes = bytes;
}

// blocks / cluster: also the number of rows of partial sums.
inline Plan plan_backward(int64_t rows, int64_t cols, DType dy, DType x, const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const KernelLimits* const limits = tuning.limits + kBackwardRows;
  Plan plan = plan_row(cols, x, kBackwardVectors, limits, tuning.backward_block_threads,
                       backward_kept_bytes(dy, x), tuning.slice_bytes, device);
  const bool mixed = held_dtype(x, dy) != x;
  if (plan.keep == Keep::kShared) {
    // The x and dy of the next row too, if it is copied: see backward_shared_rows.
    keep_next(plan, plan.slice / vector_elems(x), 32, limits[1].threads, kBackwardVectors, dy == x,
              device);
  }
  const KernelLimits& kernel = limits[static_cast<int>(plan.keep)];
  plan.registers = mixed ? kernel.mixed_registers : kernel.registers;
  plan.resident = resident_blocks(plan, device);
  const int64_t limit = resident_rows(plan, device);
  const int64_t groups = ceil_div(rows, plan.threads / plan.lanes);
  // Rows that are read twice leave their partial sums to the second pass.
  const int64_t spread = plan.keep == Keep::kNowhere
                             ? groups
                             : std::max(ceil_div(groups, tuning.backward_min_rows),
                                        int64_t{2} * device.multiprocessors / plan.cluster);
  plan.blocks = even_blocks(groups, std::min(spread, limit)) * plan.cluster;
  return plan;
}

// With a gate, of `groups` of so many columns each. A block has rows of one group, of which
// `blocks` tells how many blocks share them. The kernels that are not plain are laid out alike, in
// registers or not.
struct GatedPlan : Plan {
  int64_t group_blocks;
};

inline GatedPlan plan_gated(Plan plan, int64_t groups, const KernelLimits* limits,
                            const Device& device) {
  plan.registers = limits[static_cast<int>(plan.keep)].registers;
  plan.resident = resident_blocks(plan, device);
  GatedPlan result{plan};
  result.group_blocks = std::max(resident_rows(plan, device) / groups, int64_t{1});
  return result;
}

inline GatedPlan plan_gated_forward(int64_t rows, int64_t groups, int64_t cols, DType x,
                                    const Device& device, bool quant = false) {
  const Tuning& tuning = tuning_for(device);
  const KernelLimits* const limits = tuning.limits + (quant ? kGatedQuantRows : kGatedRows);
  // Of shared memory, for a vector of x: that and as much of the gate, or their product in fp32.
  Plan row = plan_row(cols, x, kGatedVectors, limits, tuning.forward_block_threads, 32,
                      tuning.slice_bytes, device);
  if (row.lanes > kWarp) row.threads = row.lanes;
  GatedPlan plan = plan_gated(row, groups, limits, device);
  const int waves = std::max(tuning.forward_waves * plan.vectors / kGatedVectors, 1);
  const int64_t spread = ceil_div(rows, plan.threads / plan.lanes);
  const int64_t row_groups = ceil_div(spread, kGatedVectors / plan.vectors);
  if (spread <= plan.group_blocks) {
    plan.group_blocks = spread;
  } else {
    plan.group_blocks = even_blocks(row_groups, plan.group_blocks * waves);
  }
  plan.blocks = plan.group_blocks * groups * plan.cluster;
  return plan;
}

// Of rows of y that are there and only to be quantized: a block has a row.
inline Plan plan_quantize(int64_t rows, int64_t cols, DType y, const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const KernelLimits& kernel = tuning.limits[kQuantizeRows];
  Plan plan{};
  plan.kernel = kernel.kernel;
  plan.keep = Keep::kNowhere;
  plan.vectors = plan.cluster = 1;
  plan.bytes_in_flight = 16;
  plan.slice = cols;
  plan.registers = kernel.registers;
  plan = share_slice(plan, ceil_div(cols, vector_elems(y)), kernel.threads, plan.vectors);
  plan.resident = resident_blocks(plan, device);
  plan.blocks = even_blocks(rows, resident_rows(plan, device) * tuning.forward_waves);
  return plan;
}

// Of shared memory, for a vector of x: as much of dy and the gate, and the sums for dweight.
inline int64_t gated_backward_kept_bytes(DType x) {
  return 48 + vector_elems(x) * int64_t{sizeof(float)};
}

// group_blocks: also the number of rows of partial sums.
inline GatedPlan plan_gated_backward(int64_t rows, int64_t groups, int64_t cols, DType x,
                                     const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const KernelLimits* const limits = tuning.limits + kGatedBackwardRows;
  Plan row = plan_row(cols, x, kGatedVectors, limits, tuning.backward_block_threads,
                      gated_backward_kept_bytes(x), kGatedSliceBytes, device);
  if (row.keep == Keep::kShared) {
    keep_next(row, row.slice / vector_elems(x), 48, limits[1].threads, kGatedVectors, true, device);
  }
  GatedPlan plan = plan_gated(row, groups, limits, device);
  const int64_t row_groups = ceil_div(rows, plan.threads / plan.lanes);
  const int64_t spread = std::max(ceil_div(row_groups, tuning.backward_min_rows),
                                  int64_t{2} * device.multiprocessors / (plan.cluster * groups));
  plan.group_blocks = even_blocks(row_groups, std::min(spread, plan.group_blocks));
  plan.blocks = plan.group_blocks * groups * plan.cluster;
  return plan;
}

// The second pass over rows that are read twice: a block owns a strip of columns and a range of
// rows.
struct StripPlan {
  int64_t strips;
  int64_t blocks;  // ranges of rows: also the number of rows of partial sums
};

inline StripPlan plan_strips(int64_t rows, int64_t cols, DType x, const Device& device) {
  const KernelLimits& kernel = tuning_of(device.arch).limits[kBackwardLongStrips];
  const int64_t strips = ceil_div(cols, kernel.threads * vector_elems(x));
  const int64_t resident = device.multiprocessors * blocks_of(kernel, false);
  return {strips, even_blocks(ceil_div(rows, kStripRows), ceil_div(resident, strips))};
}

}  // namespace rmsnorm::cuda

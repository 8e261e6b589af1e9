// The contract between the kernels (librmsnorm.so) and their callers: C++17, no torch, no Python.
//
//   y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)        for each row of `cols` elements
//
// The caller has checked its arguments: pointers are valid, rows > 0, cols > 0, eps >= 0 and
// finite. A kernel writes the outputs named in its struct and nothing else, and never allocates.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RMSNORM_HOST_DEVICE __host__ __device__
#else
#define RMSNORM_HOST_DEVICE
#endif

// The library is built with hidden visibility: what is inside this region is what it exports.
#pragma GCC visibility push(default)

namespace rmsnorm {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// Where the rows of a tensor start, in elements: its leading dimensions, adjacent ones merged where
// their strides allow. The elements of one row are dense. The last dimension varies fastest; a
// tensor whose rows are evenly spaced has ndim 1, and then size[0] is not looked at.
struct Rows {
  static constexpr int kMaxDims = 4;
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];

  RMSNORM_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int d = ndim - 1; d > 0; --d) {
      const int64_t next = row / size[d];
      result += (row - next * size[d]) * stride[d];
      row = next;
    }
    return result + row * stride[0];
  }
};

// What x is the sum of, where it has to be formed first: input + residual in fp32 (fp64 if either
// is), rounded to x_dtype.
struct Addends {
  const void* input;     // [rows, cols], input_dtype, placed by input_rows; nullptr: x is there
  const void* residual;  // [rows, cols], x_dtype, placed by residual_rows; may be x itself
  DType input_dtype;
  Rows input_rows, residual_rows;
  bool unrounded;  // x is the rounded sum, y and rstd are of the sum in fp32 before; not of fp64
};

enum class QType : int32_t { kFloat8E4M3, kFloat8E5M2, kInt8 };

constexpr RMSNORM_HOST_DEVICE float max_value(QType type) {
  return type == QType::kFloat8E4M3 ? 448.0f : type == QType::kFloat8E5M2 ? 57344.0f : 127.0f;
}

// y, rounded to y_dtype, once more in 8 bits: saturated and rounded to nearest even, NaN to NaN (to
// 0 in kInt8). With a static scale s it is y * (1 / s). Else each row, or each `block` columns of
// it, has its own: s = max(min(largest |y|, bound) / max_value(dtype), least), and it is y / s, in
// kInt8 y * (1 / s); all in fp32.
struct Quant {
  void* data;  // [rows, cols], dense; nullptr: not wanted
  // Static: one, which is read; else dynamic ones are written, that of (row, block) at
  // row * row_stride + block * block_stride.
  float* scale;
  int64_t block;  // columns that share a dynamic scale, 64 or 128 or all; 0: the scale is static
  int64_t row_stride, block_stride;
  float bound;  // of the largest |y| of a dynamic scale; infinite: none
  float least;  // dynamic scale
  QType dtype;
};

// y may be x itself, or the input of the addends (same pointer, same rows): a row is read before it
// is written.
struct RmsNormForward {
  const void* x;       // [rows, cols], x_dtype, placed by x_rows; written first if it has addends
  const void* weight;  // [cols], w_dtype; nullptr: no weight (and weight_offset is not looked at)
  void* y;             // [rows, cols], y_dtype, placed by y_rows; nullptr if only quant is wanted
  void* rstd;  // [rows], 1 / sqrt(mean(x^2) + eps), fp64 if x is, else fp32; nullptr: not wanted
  Rows x_rows, y_rows;
  int64_t rows, cols;
  double eps;
  double weight_offset;     // added to the weight in fp32 (in fp64 if any dtype here is kFloat64)
  bool cast_before_weight;  // round x * rstd to x_dtype, multiply by the weight, round to y_dtype
  // y: x_dtype, or with cast_before_weight the promotion of x_dtype and w_dtype; beside fp32 x a
  // 16-bit input_dtype, to which y is rounded by way of fp32.
  DType x_dtype, w_dtype, y_dtype;
  bool stream;  // a hint to the CPU: write y past the caches, which it would only pass through
  bool fresh;   // another: y, and x where it is a sum, are memory that was allocated for this call
  Addends addends;
  Quant quant;  // not with kFloat64
};

// dx = rstd * (g - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,
// with xhat = x * rstd and g = dy * (weight + weight_offset).
// With cast_before_weight the xhat of dweight is the rounded one that the forward multiplied by.
struct RmsNormBackward {
  const void* dy;      // [rows, cols], dy_dtype, placed by dy_rows
  const void* x;       // [rows, cols], x_dtype, placed by x_rows
  const void* weight;  // [cols], w_dtype; nullptr: no weight
  const void* rstd;    // [rows], as the forward returned it
  // [rows, cols], x_dtype, placed by dresidual_rows: added to dx before it is rounded; or nullptr.
  const void* dresidual;
  void* dx;         // [rows, cols], x_dtype, dense; nullptr: not wanted
  void* dweight;    // [cols], w_dtype; nullptr: not wanted
  void* workspace;  // *_backward_workspace() bytes, 64-byte aligned; nullptr if that is 0
  Rows dy_rows, x_rows, dresidual_rows;
  int64_t rows, cols;
  double eps;  // for the rows whose rstd does not fit fp32, which are done again in fp64
  double weight_offset;
  bool cast_before_weight;
  DType dy_dtype, x_dtype, w_dtype;
  bool stream, fresh;  // as above, of dx
};

// The rotary embedding of q or k: in the first 2 * pairs columns of a head, (a, b) becomes
// (a * cos - b * sin, b * cos + a * sin) by the angles of the head's token.
struct Rope {
  static constexpr int kMostPairs = 256;
  // [tokens, pairs] each, placed by angle_rows; or with positions a cache [positions, pairs] each,
  // evenly spaced.
  const void* cos;
  const void* sin;
  Rows angle_rows;
  const int64_t* positions;  // [axis_count, tokens], dense; nullptr: angles are by token
  int64_t tokens, pairs;
  // Of several axes (time, height, width) pair i takes those of axes[i], which lie so many elements
  // behind those of the first; or with positions are those of positions[axes[i]].
  int64_t axis_stride;
  int32_t axis_count;
  DType dtype;
  bool interleaved;  // a pair is two neighbours; else what lies `pairs` columns apart
  // The norm is rounded to y's dtype, and each product to step_dtype(). Else the norm is in fp32,
  // and the result rounded once. (Where one of the norm's tensors is fp64, all is fp64.)
  bool round_each_step;
  uint8_t axes[kMostPairs];

  RMSNORM_HOST_DEVICE int64_t offset(int64_t token, int axis) const {
    return positions ? positions[axis * tokens + token] * angle_rows.stride[0]
                     : angle_rows.offset(token) + axis * axis_stride;
  }
  // Of norms of dtype y: that of an operator on one and cos, which of fp64 is rounded to fp32
  // first.
  RMSNORM_HOST_DEVICE DType step_dtype(DType y) const {
    return y == dtype || y == DType::kFloat64 ? y : DType::kFloat32;
  }
};

// The norm of q or k, and then its rotary embedding. On the CPU they are one pass where a head, and
// what is rotated of it, are multiples of 64 columns, x and y are of one dtype, and a row has 8192
// columns at most. Elsewhere norm.stream is ignored.
struct RmsNormRope {
  RmsNormForward norm;  // y: the result of both; x is no sum, and nothing is quantized
  Rope rope;
  int64_t rows_per_token;  // heads of a token, each of them a row of the norm; or 1
  int64_t heads_per_row;   // 1; or those that lie side by side in a row, and are normalized as one
  // 1. On CUDA also more: the weight is [weights, cols], row r has that of r / (rows / weights),
  // and the token r % tokens; rows_per_token is 1.
  int64_t weights;
};

struct RmsNormRopeBackward {
  RmsNormBackward norm;  // dy: of the result of both; without dresidual
  Rope rope;
  int64_t rows_per_token, heads_per_row, weights;
};

// What a row is multiplied by: the activation of a gate, in fp32 (fp64 if any dtype is kFloat64).
enum class Activation : int32_t { kSilu, kSigmoid };  // silu(g) = g * sigmoid(g)

struct Gate {
  const void* data;  // [rows, cols], dtype, placed by rows; nullptr: none, groups alone
  Rows rows;
  DType dtype;
  Activation activation;
  bool before_norm;  // x is multiplied by it, unrounded, and then normalized; else the norm is
};

// y = norm(x) * act(gate), or norm(x * act(gate)). With cast_before_weight the product with the
// weight is rounded to the promotion of x_dtype and w_dtype; before the norm this is y_dtype.
struct RmsNormGated {
  RmsNormForward norm;  // x is no sum; what is quantized is y
  // Its rstd is [groups, rows]; of a gate before the norm fp64 if any dtype here is kFloat64.
  Gate gate;
  int64_t groups;  // of cols / groups columns, each of which is normalized by itself

  // Is a scale of columns that are not all of one group? Then CUDA wants y too.
  RMSNORM_HOST_DEVICE bool scales_span_groups() const {
    return norm.quant.block != 0 && norm.cols / groups % norm.quant.block != 0;
  }
};

// The roundings of the forward count as the identity.
struct RmsNormGatedBackward {
  RmsNormBackward norm;  // dy: of the result; without dresidual; rstd: [groups, rows]
  Gate gate;
  void* dgate;  // [rows, cols], gate.dtype, dense; nullptr: not wanted
  int64_t groups;
};

// sum = residual + norm(x), and y = norm(sum). On CUDA one pass; where any dtype here is kFloat64,
// all of it is in fp64.
struct RmsNormSandwich {
  RmsNormForward norm;  // of x, rounded to y_dtype and added; nothing is written to its y
  // Of the sum, its x, which may be the residual of its addends; their input is not looked at.
  // Without y the sum alone is wanted.
  RmsNormForward next;
  double scale;  // the sum times this, in fp32 and rounded again; 1: as it is
};

// A row is done in fp32 while its rstd is in this range. Then mean(x^2) + eps is in [2^-60, 2^60],
// and neither the sum of squares nor a product with rstd over- or underflows.
constexpr float kMinFastRstd = 0x1p-30f;
constexpr float kMaxFastRstd = 0x1p30f;

// CPU. These functions use one thread, the caller's: the caller splits the work and may run the
// parts of one stage in any order, at once. The bits do not depend on how it was split.
namespace cpu {

// workspace: 64-byte aligned, as many bytes as *_forward_workspace() says, of this call alone;
// nullptr if that is 0.
void rms_norm_forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end,
                      void* workspace = nullptr);
int64_t rms_norm_forward_workspace(const RmsNormForward& p);

// Backward in two stages over blocks of rows, numbered 0 .. blocks - 1. Stage two is needed where
// dweight is wanted, after all of stage one; it finishes columns [col_begin, col_end).
struct BackwardPlan {
  int64_t block_rows;  // rows in a block (the last may have fewer): from rows and cols alone
  int64_t blocks;
  int64_t workspace_bytes;  // partial sums of dweight, [blocks, cols], 8 bytes each
};
BackwardPlan rms_norm_backward_plan(const RmsNormBackward& p);
void rms_norm_backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end);
void rms_norm_backward_dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);

// The same with the rotary embedding. workspace: as of the forward, of this call alone, and never
// nullptr. Positions have been checked.
void rms_norm_rope_forward(const RmsNormRope& p, int64_t row_begin, int64_t row_end,
                           void* workspace);
int64_t rms_norm_rope_workspace(const RmsNormRope& p);
// With rms_norm_backward_plan(p.norm), and its second stage, rms_norm_backward_dweight(p.norm).
void rms_norm_rope_backward(const RmsNormRopeBackward& p, int64_t block_begin, int64_t block_end,
                            void* workspace);
int64_t rms_norm_rope_backward_workspace(const RmsNormRopeBackward& p);

// The same with a gate, or of groups. workspace: as above, of this call alone, and never nullptr.
// Backward blocks are those of rms_norm_gated_backward_plan(), the second stage is its own.
void rms_norm_gated_forward(const RmsNormGated& p, int64_t row_begin, int64_t row_end,
                            void* workspace);
int64_t rms_norm_gated_workspace(const RmsNormGated& p);
BackwardPlan rms_norm_gated_backward_plan(const RmsNormGatedBackward& p);
void rms_norm_gated_backward(const RmsNormGatedBackward& p, int64_t block_begin, int64_t block_end,
                             void* workspace);
int64_t rms_norm_gated_backward_workspace(const RmsNormGatedBackward& p);
void rms_norm_gated_backward_dweight(const RmsNormGatedBackward& p, int64_t col_begin,
                                     int64_t col_end);

// For `stream`: does writing so many bytes past the caches take less time? is_new: the memory was
// allocated for this call.
bool writes_past_caches(int64_t bytes, bool is_new);

// Instruction sets, best last: "fp64", "scalar", "avx2", "avx512", "avx512_bf16". The best that the
// machine has is in use (where another is known to be faster for a dtype, that one for it) unless
// the environment variable RMSNORM_CUDA_ISA or set_isa() names one. The bits are the same for all
// but "scalar" and "fp64". "fp64" does every row in double, of all dtypes: slow, and what a result
// in doubt is held against.
int isa_count();  // how many this library was built with
const char* isa_name(int i);
bool isa_supported(int i);  // does this machine have it?
// The one in use; throws std::runtime_error if RMSNORM_CUDA_ISA names none that is supported.
const char* isa();
// nullptr: the best again. False, and nothing changes, if not built or not supported. Not to "fp64"
// or from it while a backward runs: its second stage reads sums that the first left in double
// there.
bool set_isa(const char* name);
const char* last_isa();  // the one whose kernel ran last on this thread, "" before the first

}  // namespace cpu

// CUDA. Kernels run on the current device, on the given cudaStream_t. The result is a cudaError_t:
// 0, or the error of the launch. Nothing here synchronizes or allocates.
namespace cuda {

constexpr int kClusterCounts = 9;

// What the layout of a launch depends on, of a machine.
struct Device {
  int arch;  // that the kernels were compiled for: 90 is compute capability 9.0
  int multiprocessors;
  int64_t shared_bytes;  // shared memory that a block may ask for
  // How many clusters of 2, 4 and 8 blocks it holds at a time, where a multiprocessor has room for
  // one such block; then for two; then for three. 0: it was not asked, and it is reckoned.
  int clusters[kClusterCounts];
};

// Where a row is between its sum and its result.
enum class Keep : int { kRegisters, kShared, kNowhere };  // kNowhere: it is read a second time

struct Plan {
  const char* kernel = "";  // its name in csrc/cuda
  Keep keep;
  int vectors;    // 16-byte vectors of a row (of a tile of it) that one thread holds at a time
  int lanes;      // threads of a row (of a block's slice of it): 1, 2, 4, ..., 32, 64, 96, ...
  int threads;    // of a block: lanes times the rows it works on at a time
  int registers;  // of a thread, at most
  int bytes_in_flight;   // that a thread asks for before it needs the first
  int cluster;           // blocks that share a row
  int64_t slice;         // columns of a row that each of them has, the last one less
  int64_t shared_bytes;  // of a block, for its slice
  int64_t resident;      // blocks that a multiprocessor holds at a time
  int64_t blocks;
};

// Pure functions, there without the CUDA kernels too: what a launch of them would be.
Plan rms_norm_forward_plan(int64_t rows, int64_t cols, DType x, const Device& device);
Plan rms_norm_backward_plan(int64_t rows, int64_t cols, DType dy, DType x, const Device& device);

// What an architecture's kernels may take at most, in blocks of so many threads. nullptr ends them.
struct KernelLimits {
  const char* kernel;
  int threads;
  int registers;        // of a thread
  int mixed_registers;  // where a residual is added or not all is plain (forward), where dy has
                        // another dtype (backward), or where other threads have the other half of a
                        // pair (rope)
};
const KernelLimits* kernel_limits(int arch);

bool built();                 // were the CUDA kernels compiled into this library?
const char* architectures();  // "9.0 12.0+PTX"; if not built, the reason
int runtime_version();        // of the CUDA runtime in this library: 12090 is 12.9; 0 if not built
int driver_version();  // the newest CUDA that this machine's driver knows, so too; 0: no driver
const char* error_string(int error);
int rms_norm_forward(const RmsNormForward& p, void* stream);
int64_t rms_norm_backward_workspace(const RmsNormBackward& p);
int rms_norm_backward(const RmsNormBackward& p, void* stream);
// One or two (q and k), in one launch where x has one dtype and both are plain or both are not.
// The backward's workspace, of all of them, is that of sides[0].norm.
int rms_norm_rope_forward(const RmsNormRope* sides, int count, void* stream);
int64_t rms_norm_rope_backward_workspace(const RmsNormRopeBackward* sides, int count);
int rms_norm_rope_backward(const RmsNormRopeBackward* sides, int count, void* stream);
int rms_norm_gated_forward(const RmsNormGated& p, void* stream);
int64_t rms_norm_gated_backward_workspace(const RmsNormGatedBackward& p);
int rms_norm_gated_backward(const RmsNormGatedBackward& p, void* stream);
int rms_norm_sandwich_forward(const RmsNormSandwich& p, void* stream);
Plan last_plan();  // of what this thread launched last; its kernel is "" before the first

}  // namespace cuda
}  // namespace rmsnorm

#pragma GCC visibility pop

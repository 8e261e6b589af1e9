// The norm of q and k, and then their rotary embedding: rms_norm_rope, rms_norm_rope.out,
// rms_norm_rope_ (in place), rms_norm_rope_forward, rms_norm_rope_backward.
//
// q is [..., tokens, heads, D], or with heads_dim=-3 [..., heads, tokens, D]. A side is q or k. Its
// rows are heads in the order of the tokens; or, with a weight for each head, [heads, ..., tokens];
// or, with a weight across heads, tokens. rstd and gradients are made in that order.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index.h>
#include <ATen/ops/stack.h>

#include <numeric>
#include <vector>

#include "checks.h"
#include "formula.h"
#include "launch.h"
#include "ops.h"
#include "record.h"

namespace rmsnorm {
namespace {

struct Options {
  int64_t heads_dim;
  bool interleaved;
  at::OptionalIntArrayRef sections;
  bool interleaved_sections;
  double weight_offset;
  bool cast_before_weight;
  bool round_each_step;
};
struct Call {
  const Tensor& q;
  const OptionalTensor& k;
  const OptionalTensor& q_weight;
  const OptionalTensor& k_weight;
  const Tensor& cos;
  const Tensor& sin;
  const OptionalTensor& positions;
  std::optional<double> eps;
  Options options;

  NormOptions norm() const { return {eps, options.weight_offset, options.cast_before_weight}; }
};
struct OutCall {
  Call rope;
  const Tensor& q_out;
  const Tensor& k_out;
};
struct BackwardCall {
  const OptionalTensor& grad_q;
  const OptionalTensor& grad_k;
  const Tensor& q;
  const OptionalTensor& k;
  const OptionalTensor& q_weight;
  const OptionalTensor& k_weight;
  const Tensor& cos;
  const Tensor& sin;
  const OptionalTensor& positions;
  const Tensor& q_rstd;
  const Tensor& k_rstd;
  std::optional<double> eps;
  std::array<bool, 4> output_mask;  // of the gradients of q, k, q_weight, k_weight
  Options options;

  Call forward() const { return {q, k, q_weight, k_weight, cos, sin, positions, eps, options}; }
};

constexpr const char* kName = "rms_norm_rope";

// ------------------------------------------------------------------------------------- sides

// What one weight serves: the heads all alike, each head its own, or a row of all heads.
enum class Weights { kShared, kOwn, kAcross };

struct Side {
  const char* name;
  const Tensor& x;
  const OptionalTensor& weight;
  bool heads_first;  // heads_dim=-3
  Weights weights;

  int64_t tokens_dim() const { return x.dim() - (heads_first ? 2 : 3); }
  int64_t heads_dim() const { return x.dim() - (heads_first ? 3 : 2); }
  c10::SymInt heads() const { return x.sym_size(heads_dim()); }

  // Of the dimensions that come before the elements of a row; the others are the row.
  int64_t lead() const { return x.dim() - (weights == Weights::kAcross ? 2 : 1); }
  // x's dimensions in the order of the rows.
  c10::SmallVector<int64_t, 6> order() const {
    c10::SmallVector<int64_t, 6> dims(x.dim());
    std::iota(dims.begin(), dims.end(), 0);
    if (heads_first) std::swap(dims[x.dim() - 3], dims[x.dim() - 2]);
    if (weights == Weights::kOwn) {
      dims.erase(dims.end() - 2);
      dims.insert(dims.begin(), heads_dim());
    }
    return dims;
  }
  bool is_in_order() const { return !heads_first && weights != Weights::kOwn; }
  Tensor in_order(const Tensor& t) const { return is_in_order() ? t : t.permute(order()); }
  // What is in the order of the rows, as x is.
  Tensor as_x(const Tensor& t) const {
    if (is_in_order()) return t;
    const auto dims = order();
    c10::SmallVector<int64_t, 6> back(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) back[dims[i]] = static_cast<int64_t>(i);
    return t.permute(back);
  }
  c10::SymDimVector shape_in_order() const {
    c10::SymDimVector shape;
    for (const int64_t d : order()) shape.push_back(x.sym_size(d));
    return shape;
  }
};

// A side's rows as they lie; a dense copy of them where they have to be.
Placed place_in_order(const Side& side, const Tensor& t) {
  if (side.is_in_order()) return place(t, side.lead());
  c10::DimVector sizes, strides;
  for (const int64_t d : side.order()) {
    sizes.push_back(t.size(d));
    strides.push_back(t.stride(d));
  }
  if (const auto rows = rows_of(sizes, strides, side.lead())) {
    return {c10::MaybeOwned<Tensor>::borrowed(t), *rows};
  }
  const Tensor dense = side.in_order(t).contiguous();
  return {c10::MaybeOwned<Tensor>::owned(std::in_place, dense), *rows_of(dense, side.lead())};
}

Weights weights_of(const char* op, const char* name, const Tensor& x, int64_t heads_dim,
                   const OptionalTensor& weight) {
  if (!weight) return Weights::kShared;
  const c10::SymInt cols = x.sym_size(-1), heads = x.sym_size(heads_dim);
  check_dtype(op, name, *weight);
  const SymIntArrayRef shape = weight->sym_sizes();
  if (shape.size() == 1 && shape[0] == cols) return Weights::kShared;
  if (shape.size() == 1 && shape[0] == heads * cols) return Weights::kAcross;
  if (shape.size() == 2 && shape[0] == heads && shape[1] == cols) return Weights::kOwn;
  TORCH_CHECK(false, op, ": expected ", name, " of shape [", cols, "], of each head its own [",
              heads, ", ", cols, "], or across heads [", heads * cols, "], but got ", shape);
}

void check_heads(const char* op, const char* name, const Tensor& x) {
  check_dtype(op, name, x);
  TORCH_CHECK_VALUE(x.dim() >= 3, op, ": expected ", name,
                    " with dimensions of tokens, heads and a head's elements, but got shape ",
                    x.sym_sizes());
  TORCH_SYM_CHECK((x.sym_size(-1) % 2).sym_eq(0), op, ": expected heads of ", name,
                  " with an even number of elements, but got shape ", x.sym_sizes());
}

bool is_known(const c10::SymInt& a, const c10::SymInt& b) {
  return !a.is_heap_allocated() && !b.is_heap_allocated();
}
bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  if (is_known(a, b)) return a.as_int_unchecked() == b.as_int_unchecked();
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

// Do the dimensions of a tensor, from `first` on, broadcast to those of q's tokens?
bool broadcasts(const Tensor& t, int64_t first, int64_t last, SymIntArrayRef tokens) {
  const int64_t missing = static_cast<int64_t>(tokens.size()) - (last - first);
  if (missing < 0) return false;
  for (int64_t d = first; d < last; ++d) {
    const c10::SymInt size = t.sym_size(d), wanted = tokens[missing + d - first];
    const bool fits =
        is_known(size, wanted)
            ? size == wanted || size == 1
            : size.sym_eq(wanted).sym_or(size.sym_eq(1)).expect_true(__FILE__, __LINE__);
    if (!fits) return false;
  }
  return true;
}

// q's dimensions without heads and elements.
c10::SymDimVector tokens_of(const Tensor& q, int64_t heads_dim) {
  c10::SymDimVector shape;
  for (int64_t d = 0; d < q.dim() - 1; ++d) {
    if (d != q.dim() + heads_dim) shape.push_back(q.sym_size(d));
  }
  return shape;
}

void check_angles(const char* op, const Call& call) {
  const auto& [q, k, q_weight, k_weight, cos, sin, positions, eps, options] = call;
  const auto& sections = options.sections;
  const int64_t axes = sections ? 1 : 0;  // dimensions in front of cos', or of positions'
  check_dtype(op, "cos", cos);
  check_tensor(op, "sin", sin, cos.sym_sizes(), cos.scalar_type());
  const c10::SymDimVector tokens = tokens_of(q, options.heads_dim);
  const Tensor& angles = positions ? *positions : cos;
  const char* const name = positions ? "positions" : "cos and sin";
  const int64_t last = angles.dim() - (positions ? 0 : 1);
  if (positions) {
    TORCH_CHECK(positions->scalar_type() == at::kLong || positions->scalar_type() == at::kInt, op,
                ": expected positions of dtype int64 or int32, but got ", positions->scalar_type());
    TORCH_CHECK(cos.dim() == 2, op, ": expected cos and sin beside positions to be a cache of ",
                "shape [max_position, R/2], but got ", cos.sym_sizes());
  }
  if (sections) {
    TORCH_CHECK_VALUE(!sections->empty(), op, ": expected sections of one axis at least");
    TORCH_CHECK(angles.dim() > 0 && equal(angles.sym_size(0), c10::SymInt(sections->size())), op,
                ": expected ", name, " with a first dimension of the ", sections->size(),
                " axes that sections has, but got shape ", angles.sym_sizes());
  }
  TORCH_CHECK(last >= axes && broadcasts(angles, axes, last, tokens), op, ": expected ", name,
              " of shape ", sections ? "[axes, " : "[", "..., tokens", positions ? "]" : ", R/2]",
              " that broadcasts to q's ", SymIntArrayRef(tokens), ", but got ", angles.sym_sizes());
  const c10::SymInt pairs = cos.sym_size(-1);
  TORCH_SYM_CHECK((pairs * 2).sym_le(q.sym_size(-1)), op, ": expected cos and sin of at most ",
                  q.sym_size(-1) / 2, " pairs, half the elements of a head, but got shape ",
                  cos.sym_sizes(), " (of transformers' cos and sin, whose halves are alike: one)");
  TORCH_SYM_CHECK(pairs.sym_le(Rope::kMostPairs), op, ": expected cos and sin of at most ",
                  int64_t{Rope::kMostPairs}, " pairs, but got shape ", cos.sym_sizes());
  TORCH_CHECK_VALUE(sections || !options.interleaved_sections, op,
                    ": interleaved_sections is of sections; expected these to be given too");
  if (!sections) return;
  int64_t sum = 0;
  for (const int64_t size : *sections) {
    TORCH_CHECK_VALUE(size >= 0, op, ": expected sections that are not negative, but got ",
                      *sections);
    sum += size;
  }
  TORCH_CHECK_VALUE(sections->size() <= 255 && equal(pairs, sum), op,
                    ": expected sections that add up to the ", pairs,
                    " pairs of cos and sin, but got ", *sections);
  if (!options.interleaved_sections) return;
  const int64_t count = static_cast<int64_t>(sections->size());
  for (int64_t axis = 1; axis < count; ++axis) {
    const int64_t last = axis + ((*sections)[axis] - 1) * count;
    TORCH_CHECK_VALUE(last < sum, op, ": expected interleaved sections whose last pairs are among ",
                      sum, ", but that of axis ", axis, " in ", *sections, " is ", last);
  }
}

// Checks all arguments, and says what each side's weight is.
std::vector<Side> checked_sides(const char* op, const Call& call) {
  const auto& [q, k, q_weight, k_weight, cos, sin, positions, eps, options] = call;
  const int64_t heads_dim = options.heads_dim;
  TORCH_CHECK_VALUE(heads_dim == -2 || heads_dim == -3, op,
                    ": expected heads_dim to be -2 or -3, but got ", heads_dim);
  check_options(op, call.norm());
  check_heads(op, "q", q);
  const bool heads_first = heads_dim == -3;
  std::vector<Side> sides;
  sides.reserve(2);
  sides.push_back(
      {"q", q, q_weight, heads_first, weights_of(op, "q_weight", q, heads_dim, q_weight)});
  TORCH_CHECK(k || !k_weight, op, ": k_weight is of k; expected k to be given too");
  if (k) {
    check_heads(op, "k", *k);
    bool alike = k->dim() == q.dim();
    for (int64_t d = 0; alike && d < q.dim(); ++d) {
      alike = d == q.dim() + heads_dim || equal(k->sym_size(d), q.sym_size(d));
    }
    TORCH_CHECK(alike, op, ": expected k of q's shape ", q.sym_sizes(),
                ", of any number of heads (dimension ", heads_dim, ", by heads_dim), but got ",
                k->sym_sizes());
    sides.push_back(
        {"k", *k, k_weight, heads_first, weights_of(op, "k_weight", *k, heads_dim, k_weight)});
  }
  check_angles(op, call);
  return sides;
}

at::ScalarType output_type(const Side& side, const Call& call) {
  return output_type(side.x, side.weight, call.norm());
}

// The axis whose angles pair i takes.
uint8_t axis_of(const Options& options, int64_t pair) {
  if (!options.sections) return 0;
  const at::IntArrayRef sections = *options.sections;
  const int64_t count = static_cast<int64_t>(sections.size());
  if (options.interleaved_sections) {
    const int64_t axis = pair % count;
    return static_cast<uint8_t>(pair < sections[axis] * count ? axis : 0);
  }
  uint8_t axis = 0;
  for (int64_t end = sections[0]; pair >= end; end += sections[++axis]) {
  }
  return axis;
}

// ------------------------------------------------------------------------------------- launch

// cos and sin as the kernels read them.
class Angles {
 public:
  Angles(const char* op, const Call& call) : cos_(borrow(call.cos)), sin_(borrow(call.sin)) {
    const auto& [q, k, q_weight, k_weight, cos, sin, positions, eps, options] = call;
    const at::OptionalIntArrayRef sections = options.sections;
    c10::DimVector tokens;
    for (const c10::SymInt& size : tokens_of(q, options.heads_dim)) {
      tokens.push_back(size.as_int_unchecked());
    }
    rope_.tokens = c10::multiply_integers(tokens);
    rope_.pairs = cos.size(-1);
    rope_.axis_count = sections ? static_cast<int32_t>(sections->size()) : 1;
    rope_.dtype = dtype(cos);
    rope_.interleaved = options.interleaved;
    rope_.round_each_step = options.round_each_step;
    for (int64_t i = 0; sections && i < rope_.pairs; ++i) rope_.axes[i] = axis_of(options, i);
    if (!try_rows(tokens, positions.has_value())) {
      cos_ = own(cos.contiguous());
      sin_ = own(sin.contiguous());
      // A dense cos that many leading dimensions are missing of may still be in too many pieces.
      if (!try_rows(tokens, positions.has_value())) {
        c10::DimVector shape(tokens);
        shape.push_back(rope_.pairs);
        if (sections) shape.insert(shape.begin(), rope_.axis_count);
        cos_ = own(expanded(cos, shape, sections.has_value()).contiguous());
        sin_ = own(expanded(sin, shape, sections.has_value()).contiguous());
        TORCH_INTERNAL_ASSERT(try_rows(tokens, positions.has_value()));
      }
    }
    rope_.cos = cos_->const_data_ptr();
    rope_.sin = sin_->const_data_ptr();
    if (!positions) return;
    c10::DimVector shape(tokens);
    if (sections) shape.insert(shape.begin(), rope_.axis_count);
    positions_ = borrow(*positions);
    if (positions->scalar_type() != at::kLong || positions->sizes() != at::IntArrayRef(shape) ||
        !positions->is_contiguous()) {
      const Tensor spread = expanded(positions->to(at::kLong), shape, sections.has_value());
      positions_ = own(spread.contiguous());
    }
    rope_.positions = positions_->const_data_ptr<int64_t>();
    if (q.is_cpu()) check_positions(op, cos.size(0));
  }
  const Rope& rope() const { return rope_; }

 private:
  using Held = c10::MaybeOwned<Tensor>;
  static Held borrow(const Tensor& t) { return Held::borrowed(t); }
  static Held own(Tensor t) { return Held::owned(std::in_place, std::move(t)); }

  // With axes in front, ones are missing behind these.
  static Tensor expanded(const Tensor& t, at::IntArrayRef shape, bool has_axes) {
    if (!has_axes) return t.expand(shape);
    Tensor result = t;
    while (result.dim() < static_cast<int64_t>(shape.size())) result = result.unsqueeze(1);
    return result.expand(shape);
  }

  // Can cos and sin be read as they lie, both in the same way?
  bool try_rows(at::IntArrayRef tokens, bool cached) {
    const Tensor &cos = *cos_, &sin = *sin_;
    if (rope_.pairs > 1 && cos.stride(-1) != 1) return false;
    for (int64_t d = 0; d < cos.dim(); ++d) {
      if (cos.size(d) > 1 && cos.stride(d) != sin.stride(d)) return false;
    }
    if (cached) {
      rope_.angle_rows = {1, {1}, {cos.stride(0)}};
      return true;
    }
    const int64_t first =
        rope_.axis_count > 1 || cos.dim() > static_cast<int64_t>(tokens.size()) + 1 ? 1 : 0;
    const int64_t missing = static_cast<int64_t>(tokens.size()) - (cos.dim() - 1 - first);
    c10::DimVector strides(tokens.size() + 1, 0), sizes(tokens);
    sizes.push_back(rope_.pairs);
    for (int64_t d = first; d < cos.dim() - 1; ++d) {
      if (cos.size(d) > 1) strides[missing + d - first] = cos.stride(d);
    }
    strides.back() = 1;
    rope_.axis_stride = first ? cos.stride(0) : 0;
    const auto rows = rows_of(sizes, strides, static_cast<int64_t>(tokens.size()));
    if (rows) rope_.angle_rows = *rows;
    return rows.has_value();
  }

  void check_positions(const char* op, int64_t count) const {
    const int64_t* const begin = rope_.positions;
    const int64_t* const end = begin + positions_->numel();
    const int64_t* const wrong = std::find_if(
        begin, end, [&](int64_t position) { return position < 0 || position >= count; });
    TORCH_CHECK_INDEX(wrong == end, op, ": expected positions from 0 to ", count - 1,
                      ", what cos and sin have, but got ", *wrong);
  }

  Held cos_, sin_, positions_;
  Rope rope_{};
};

// All that a kernel is told of a side in either direction, but for its results.
template <class Params>
void set_side(Params& p, const Side& side, const Placed& x, const Tensor& weight, const Rope& rope,
              const NormOptions& options) {
  set_norm(p.norm, x, side.lead(), weight, options);
  p.norm.cast_before_weight = options.cast_before_weight && weight.defined();
  const bool across = side.weights == Weights::kAcross, own = side.weights == Weights::kOwn;
  const int64_t heads = side.x.size(side.heads_dim());
  p.norm.cols = side.x.size(-1) * (across ? heads : 1);
  p.norm.rows = side.x.numel() / p.norm.cols;
  p.rope = rope;
  p.rows_per_token = across || own ? 1 : heads;
  p.heads_per_row = across ? heads : 1;
  p.weights = own ? heads : 1;
}

// Of a side of weights of their own the rows of one head, for the CPU.
const void* behind(const void* p, int64_t elements, DType type) {
  return p ? static_cast<const char*>(p) + elements * size_of(type) : nullptr;
}
void* behind(void* p, int64_t elements, DType type) {
  return const_cast<void*>(behind(const_cast<const void*>(p), elements, type));
}
DType rstd_dtype(DType x) { return x == DType::kFloat64 ? x : DType::kFloat32; }

RmsNormRope head_of(const RmsNormRope& side, int64_t head) {
  RmsNormRope p = side;
  const int64_t rows = p.norm.rows / p.weights, row = head * rows;
  p.weights = 1;
  p.norm.rows = rows;
  p.norm.x = behind(p.norm.x, p.norm.x_rows.offset(row), p.norm.x_dtype);
  p.norm.y = behind(p.norm.y, p.norm.y_rows.offset(row), p.norm.y_dtype);
  p.norm.weight = behind(p.norm.weight, head * p.norm.cols, p.norm.w_dtype);
  p.norm.rstd = behind(p.norm.rstd, row, rstd_dtype(p.norm.x_dtype));
  return p;
}
RmsNormRopeBackward head_of(const RmsNormRopeBackward& side, int64_t head) {
  RmsNormRopeBackward p = side;
  const int64_t rows = p.norm.rows / p.weights, row = head * rows;
  p.weights = 1;
  p.norm.rows = rows;
  p.norm.dy = behind(p.norm.dy, p.norm.dy_rows.offset(row), p.norm.dy_dtype);
  p.norm.x = behind(p.norm.x, p.norm.x_rows.offset(row), p.norm.x_dtype);
  p.norm.weight = behind(p.norm.weight, head * p.norm.cols, p.norm.w_dtype);
  p.norm.rstd = behind(p.norm.rstd, row, rstd_dtype(p.norm.x_dtype));
  p.norm.dx = behind(p.norm.dx, row * p.norm.cols, p.norm.x_dtype);
  p.norm.dweight = behind(p.norm.dweight, head * p.norm.cols, p.norm.w_dtype);
  return p;
}

// (A vector of std would be seen outside of this library.)
template <class Params>
using Sides = c10::SmallVector<Params, 2>;

// q and k, and of each of them the heads that have a weight of their own.
template <class Params>
Sides<Params> units_of(const Sides<Params>& sides) {
  Sides<Params> units;
  for (const Params& side : sides) {
    if (side.weights == 1) {
      units.push_back(side);
    } else {
      for (int64_t head = 0; head < side.weights; ++head) units.push_back(head_of(side, head));
    }
  }
  return units;
}

template <class Params>
int64_t bytes_of(const Sides<Params>& sides) {
  int64_t bytes = 0;
  for (const Params& p : sides) {
    bytes += 2 * p.norm.rows * p.norm.cols * size_of(p.norm.x_dtype);
  }
  return bytes;
}

// A forward of the sides, which may be none. All outlive it.
class Launch {
 public:
  Launch(const char* op, const Call& call) : op_(op), call_(call), angles_(op, call) {}

  // y: as its rows lie. `is_new`: it was allocated for this call, and is dense.
  void add(const Side& side, const Tensor& y, const Rows& y_rows, bool is_new, const Tensor& rstd) {
    const auto& [x, weight] = held_.emplace_back(place_in_order(side, side.x), dense(side.weight));
    RmsNormRope& p = sides_.emplace_back();
    set_side(p, side, x, *weight, angles_.rope(), call_.norm());
    p.norm.y = y.mutable_data_ptr();
    p.norm.y_rows = y_rows;
    p.norm.y_dtype = dtype(y);
    p.norm.stream = p.norm.x != p.norm.y && cpu::writes_past_caches(y.nbytes(), is_new);
    p.norm.fresh = is_new && y_rows.ndim == 1 && y_rows.stride[0] == p.norm.cols;
    p.norm.rstd = rstd.defined() ? rstd.mutable_data_ptr() : nullptr;
  }

  void run() const {
    if (sides_.empty()) return;
    if (!call_.q.is_cpu()) {
      return run_cuda(op_, call_.q, [&](void* stream) {
        return cuda::rms_norm_rope_forward(sides_.data(), static_cast<int>(sides_.size()), stream);
      });
    }
    cpu::isa();  // throws outside the parallel region if the environment asks for what is not there
    const bool is_split = std::any_of(sides_.begin(), sides_.end(),
                                      [](const RmsNormRope& p) { return p.weights > 1; });
    const Sides<RmsNormRope> heads = is_split ? units_of(sides_) : Sides<RmsNormRope>();
    const Sides<RmsNormRope>& units = is_split ? heads : sides_;
    int64_t workspace_bytes = 0;
    for (const RmsNormRope& p : units) {
      workspace_bytes = std::max(workspace_bytes, cpu::rms_norm_rope_workspace(p));
    }
    const int64_t tokens = angles_.rope().tokens;
    in_parts(tokens, bytes_of(sides_) / tokens, workspace_bytes, call_.q,
             [&](int64_t part, int64_t parts, void* workspace) {
               for (const RmsNormRope& p : units) {
                 const int64_t rows = p.norm.rows;
                 cpu::rms_norm_rope_forward(p, part * rows / parts, (part + 1) * rows / parts,
                                            workspace);
               }
             });
  }

 private:
  const char* op_;
  const Call& call_;
  const Angles angles_;
  c10::SmallVector<std::pair<Placed, c10::MaybeOwned<Tensor>>, 2> held_;
  Sides<RmsNormRope> sides_;
};

// A result that is not there: a compiler that writes into buffers of its own can only do so if each
// result is a tensor.
Tensor nothing(const Tensor& like, at::ScalarType type) {
  const c10::SymInt zero[] = {0};
  return allocate(zero, like, type);
}

// ------------------------------------------------------------------------------------- forward

// Of x's shape, and dense; rows of all heads are dense in themselves.
Tensor allocate_like(const Side& side, at::ScalarType type) {
  if (side.weights != Weights::kAcross) return allocate(side.x.sym_sizes(), side.x, type);
  return side.as_x(allocate(side.shape_in_order(), side.x, type));
}

template <bool want_rstd>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rope_forward(const Call& call) {
  const std::vector<Side> sides = checked_sides(kName, call);
  Tensor y[2], rstd[2];
  for (size_t i = 0; i < 2; ++i) {
    if (i < sides.size()) {
      const Side& side = sides[i];
      y[i] = allocate_like(side, output_type(side, call));
      if (want_rstd) {
        const c10::SymDimVector shape = side.shape_in_order();
        rstd[i] = allocate(SymIntArrayRef(shape).slice(0, side.lead()), side.x, rstd_type(side.x));
      }
    } else {
      y[i] = nothing(call.q, call.q.scalar_type());
      if (want_rstd) rstd[i] = nothing(call.q, rstd_type(call.q));
    }
  }
  if (!call.q.is_meta()) {
    std::optional<Launch> launch;
    for (size_t i = 0; i < sides.size(); ++i) {
      if (sides[i].x.numel() == 0) {
        if (want_rstd) rstd[i].fill_(std::numeric_limits<double>::quiet_NaN());
        continue;
      }
      if (!launch) launch.emplace(kName, call);
      const Rows rows = place_in_order(sides[i], y[i]).rows;
      launch->add(sides[i], y[i], rows, /*is_new=*/true, rstd[i]);
    }
    if (launch) launch->run();
  }
  return {std::move(y[0]), std::move(y[1]), std::move(rstd[0]), std::move(rstd[1])};
}
std::tuple<Tensor, Tensor> rms_norm_rope(const Call& call) {
  auto [q, k, q_rstd, k_rstd] = rms_norm_rope_forward<false>(call);
  return {std::move(q), std::move(k)};
}

// Into tensors that the caller owns: q's and k's places, or those of the arguments themselves.
void write(const char* op, const Call& call, const std::vector<Side>& sides,
           const std::array<const Tensor*, 2>& written, const std::array<const char*, 2>& names) {
  if (call.q.is_meta()) return;
  const auto by_token = [&](const Tensor& t) {
    return call.options.heads_dim == -3 ? t.transpose(-3, -2) : t;
  };
  const int64_t lead = call.q.dim() - 1, cols = call.q.size(-1);
  std::array<Rows, 2> rows;
  for (size_t i = 0; i < sides.size(); ++i) {
    const Side& side = sides[i];
    const Tensor& y = *written[i];
    if (y.numel() == 0) continue;
    const int64_t row_cols =
        cols * (side.weights == Weights::kAcross ? side.x.size(side.heads_dim()) : 1);
    rows[i] = check_written_rows(op, names[i], side.in_order(y), side.lead(), row_cols, side.name,
                                 side.in_order(side.x));
    const std::pair<const char*, const Tensor*> read[] = {
        {"q_weight", call.q_weight ? &*call.q_weight : nullptr},
        {"k_weight", call.k_weight ? &*call.k_weight : nullptr},
        {"cos", &call.cos},
        {"sin", &call.sin},
        {"positions", call.positions ? &*call.positions : nullptr}};
    for (const auto& [name, t] : read) {
      if (t) check_apart(op, names[i], y, name, *t);
    }
    for (size_t j = 0; j < sides.size(); ++j) {
      if (j == i) continue;
      const Tensor y_by_token = by_token(y);
      check_apart(op, names[i], y_by_token, names[j], by_token(*written[j]), lead, cols);
      check_apart(op, names[i], y_by_token, sides[j].name, by_token(sides[j].x), lead, cols);
    }
  }
  std::optional<Launch> launch;
  for (size_t i = 0; i < sides.size(); ++i) {
    if (written[i]->numel() == 0) continue;
    if (!launch) launch.emplace(op, call);
    launch->add(sides[i], *written[i], rows[i], /*is_new=*/false, Tensor());
  }
  if (launch) launch->run();
}

void rms_norm_rope_(const Call& call) {
  constexpr const char* op = "rms_norm_rope_";
  const std::vector<Side> sides = checked_sides(op, call);
  for (const Side& side : sides) {
    TORCH_CHECK(output_type(side, call) == side.x.scalar_type(), op, ": the result has dtype ",
                output_type(side, call), " and cannot take the place of ", side.name,
                ", which has ", side.x.scalar_type(), "; use rms_norm_rope");
  }
  write(op, call, sides, {&call.q, call.k ? &*call.k : nullptr}, {"q", "k"});
}

void rms_norm_rope_out(const OutCall& out) {
  const Call& call = out.rope;
  const std::vector<Side> sides = checked_sides(kName, call);
  const std::array<const Tensor*, 2> written = {&out.q_out, &out.k_out};
  constexpr std::array<const char*, 2> kNames = {"q_out", "k_out"};
  for (size_t i = 0; i < 2; ++i) {
    if (i < sides.size()) {
      const Side& side = sides[i];
      check_tensor(kName, kNames[i], *written[i], side.x.sym_sizes(), output_type(side, call));
    } else {
      const c10::SymInt zero[] = {0};
      check_tensor(kName, kNames[i], *written[i], zero);
    }
  }
  write(kName, call, sides, written, kNames);
}

// ------------------------------------------------------------------------------------ backward

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rope_backward(const BackwardCall& call) {
  constexpr const char* op = "rms_norm_rope_backward";
  const Call forward = call.forward();
  const std::vector<Side> sides = checked_sides(op, forward);
  const OptionalTensor* const grads[] = {&call.grad_q, &call.grad_k};
  const Tensor* const rstds[] = {&call.q_rstd, &call.k_rstd};
  constexpr const char* kGrads[] = {"grad_q", "grad_k"};
  constexpr const char* kRstds[] = {"q_rstd", "k_rstd"};
  Tensor dx[2], dweight[2];
  for (size_t i = 0; i < sides.size(); ++i) {
    const Side& side = sides[i];
    const c10::SymDimVector shape = side.shape_in_order();
    check_tensor(op, kRstds[i], *rstds[i], SymIntArrayRef(shape).slice(0, side.lead()),
                 rstd_type(side.x));
    if (!*grads[i]) continue;
    check_dtype(op, kGrads[i], **grads[i]);
    check_tensor(op, kGrads[i], **grads[i], side.x.sym_sizes());
    if (call.output_mask[i]) dx[i] = allocate(shape, side.x, side.x.scalar_type());
    if (call.output_mask[2 + i] && side.weight) {
      dweight[i] = at::empty_symint(side.weight->sym_sizes(), side.weight->options());
    }
  }
  const auto results = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    for (size_t i = 0; i < sides.size(); ++i) {
      if (dx[i].defined()) dx[i] = sides[i].as_x(dx[i]);
    }
    return {dx[0], dx[1], dweight[0], dweight[1]};
  };
  if (call.q.is_meta()) return results();

  std::vector<Placed> held;
  std::vector<c10::MaybeOwned<Tensor>> dense_tensors;
  Sides<RmsNormRopeBackward> params;
  held.reserve(4), dense_tensors.reserve(4);
  std::optional<Angles> angles;
  for (size_t i = 0; i < sides.size(); ++i) {
    if (!dx[i].defined() && !dweight[i].defined()) continue;
    const Side& side = sides[i];
    if (side.x.numel() == 0) {
      if (dweight[i].defined()) dweight[i].zero_();
      continue;
    }
    if (!angles) angles.emplace(op, forward);
    const Placed& x = held.emplace_back(place_in_order(side, side.x));
    const Tensor& weight = *dense_tensors.emplace_back(dense(side.weight));
    RmsNormRopeBackward& p = params.emplace_back();
    set_side(p, side, x, weight, angles->rope(), forward.norm());
    const Placed& dy = held.emplace_back(place_in_order(side, **grads[i]));
    p.norm.dy = dy.tensor->const_data_ptr();
    p.norm.dy_rows = dy.rows;
    p.norm.dy_dtype = dtype(*dy.tensor);
    p.norm.rstd = dense_tensors.emplace_back(rstds[i]->expect_contiguous())->const_data_ptr();
    p.norm.dx = dx[i].defined() ? dx[i].mutable_data_ptr() : nullptr;
    p.norm.dweight = dweight[i].defined() ? dweight[i].mutable_data_ptr() : nullptr;
    p.norm.stream = dx[i].defined() && cpu::writes_past_caches(dx[i].nbytes(), true);
    p.norm.fresh = dx[i].defined();
  }
  if (params.empty()) return results();
  const auto bytes = [&](int64_t count) {
    return at::empty({count}, call.q.options().dtype(at::kByte));
  };
  if (!call.q.is_cpu()) {
    run_cuda(op, call.q, [&](void* stream) {
      const int count = static_cast<int>(params.size());
      const int64_t size = cuda::rms_norm_rope_backward_workspace(params.data(), count);
      const Tensor workspace = bytes(size);
      params[0].norm.workspace = size ? workspace.mutable_data_ptr() : nullptr;
      return cuda::rms_norm_rope_backward(params.data(), count, stream);
    });
    return results();
  }
  cpu::isa();  // as in the forward
  Sides<RmsNormRopeBackward> units = units_of(params);
  std::vector<Tensor> sums;
  int64_t tile_bytes = 0, most_blocks = 0;
  std::vector<int64_t> blocks;
  for (RmsNormRopeBackward& p : units) {
    const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p.norm);
    if (plan.workspace_bytes) {
      p.norm.workspace = sums.emplace_back(bytes(plan.workspace_bytes)).mutable_data_ptr();
    }
    blocks.push_back(plan.blocks);
    most_blocks = std::max(most_blocks, plan.blocks);
    tile_bytes = std::max(tile_bytes, cpu::rms_norm_rope_backward_workspace(p));
  }
  in_parts(most_blocks, 2 * bytes_of(params) / most_blocks, tile_bytes, call.q,
           [&](int64_t part, int64_t parts, void* workspace) {
             for (size_t i = 0; i < units.size(); ++i) {
               cpu::rms_norm_rope_backward(units[i], part * blocks[i] / parts,
                                           (part + 1) * blocks[i] / parts, workspace);
             }
           });
  for (size_t i = 0; i < units.size(); ++i) {
    const RmsNormBackward& p = units[i].norm;
    if (!p.dweight) continue;
    parallel_for(p.cols, grain(blocks[i] * 8), [&](int64_t begin, int64_t end) {
      cpu::rms_norm_backward_dweight(p, begin, end);
    });
  }
  return results();
}

// ------------------------------------------------------------------------------------- formula

// cos or sin of each token and pair, with a dimension of one head.
Tensor angles_of(const Tensor& table, const Call& call) {
  const Options& options = call.options;
  const OptionalTensor& positions = call.positions;
  const Tensor angles = positions ? at::index(table, {positions->to(at::kLong)}) : table;
  if (!options.sections) return angles.unsqueeze(-2);
  const int64_t pairs =
      std::accumulate(options.sections->begin(), options.sections->end(), int64_t{0});
  if (pairs == 0) return angles.select(0, 0).unsqueeze(-2);
  std::vector<Tensor> parts;
  for (int64_t begin = 0, end = 0; begin < pairs; begin = end) {
    const int64_t axis = axis_of(options, begin);
    while (end < pairs && axis_of(options, end) == axis) ++end;
    parts.push_back(angles.select(0, axis).narrow(-1, begin, end - begin));
  }
  return at::cat(parts, -1).unsqueeze(-2);
}

// t [..., tokens, heads, D] is rotated by each pair's angle; products have the wider dtype.
Tensor rotated(const Tensor& t, const Call& call, bool reversed) {
  const bool in_fp64 = t.scalar_type() == at::kDouble;
  const auto angles = [&](const Tensor& table) {
    const Tensor angles = angles_of(table, call);
    return angles.scalar_type() == at::kDouble && !in_fp64 ? angles.to(at::kFloat) : angles;
  };
  const Tensor cos = angles(call.cos);
  Tensor sin = angles(call.sin);
  if (reversed) sin = -sin;
  const c10::SymInt pairs = call.cos.sym_size(-1);
  const auto part = [&](const c10::SymInt& begin, const c10::SymInt& count) {
    return t.narrow_symint(-1, begin, count);
  };
  const Tensor rest = part(pairs * 2, t.sym_size(-1) - pairs * 2);
  if (call.options.interleaved) {
    const Tensor neighbours = part(0, pairs * 2).unflatten_symint(-1, {pairs, 2});
    const Tensor a = neighbours.select(-1, 0), b = neighbours.select(-1, 1);
    return at::cat({at::stack({a * cos - b * sin, b * cos + a * sin}, -1).flatten(-2), rest}, -1);
  }
  const Tensor a = part(0, pairs), b = part(pairs, pairs);
  return at::cat({a * cos - b * sin, b * cos + a * sin, rest}, -1);
}

class SideFormula {
 public:
  SideFormula(const char* op, Rescaling rescaling, const Side& side, const Call& call)
      : side_(side),
        call_(call),
        norm_(op, rescaling, rows(side.x), 1, side.weights == Weights::kOwn ? 2 : 1, side.weight,
              call.norm()) {}

  Tensor output() const {
    const at::ScalarType type = output_type(side_, call_);
    Tensor norm = norm_.product();
    if (call_.options.round_each_step) norm = norm.to(type);
    return tensor(rotated(heads(norm), call_, /*reversed=*/false)).to(type);
  }
  Tensor rstd() const {
    const Tensor rstd = norm_.rstd();
    return side_.weights == Weights::kOwn ? rstd.movedim(-1, 0) : rstd;
  }
  std::tuple<Tensor, Tensor> backward(const Tensor& grad, std::array<bool, 2> output_mask) const {
    const Tensor dy = grad.to(compute_type(side_.x, side_.weight));
    const Tensor turned = rotated(by_token(dy), call_, /*reversed=*/true);
    auto [dx, dweight] =
        norm_.backward(rows(turned, /*is_by_token=*/true), output_mask, std::nullopt);
    if (dx.defined()) dx = tensor(heads(dx));
    return {dx, dweight};
  }

 private:
  Tensor by_token(const Tensor& t) const { return side_.heads_first ? t.transpose(-3, -2) : t; }
  Tensor tensor(const Tensor& by_token) const { return this->by_token(by_token); }
  // [..., tokens, heads, D], or across heads [..., tokens, heads * D].
  Tensor rows(const Tensor& t, bool is_by_token = false) const {
    const Tensor ordered = is_by_token ? t : by_token(t);
    return side_.weights == Weights::kAcross ? ordered.flatten(-2) : ordered;
  }
  Tensor heads(const Tensor& rows) const {
    return side_.weights == Weights::kAcross ? rows.unflatten_symint(-1, {side_.heads(), -1})
                                             : rows;
  }

  const Side& side_;
  const Call& call_;
  const Formula norm_;
};

template <Rescaling rescaling>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rope_forward_formula(const Call& call) {
  const std::vector<Side> sides = checked_sides(kName, call);
  Tensor y[2], rstd[2];
  for (size_t i = 0; i < 2; ++i) {
    if (i < sides.size()) {
      const SideFormula formula(kName, rescaling, sides[i], call);
      y[i] = formula.output();
      rstd[i] = formula.rstd();
    } else {
      y[i] = call.q.new_empty({0});
      rstd[i] = call.q.new_empty({0}, call.q.options().dtype(rstd_type(call.q)));
    }
  }
  return {y[0], y[1], rstd[0], rstd[1]};
}
template <Rescaling rescaling>
std::tuple<Tensor, Tensor> rms_norm_rope_formula(const Call& call) {
  auto [q, k, q_rstd, k_rstd] = rms_norm_rope_forward_formula<rescaling>(call);
  return {std::move(q), std::move(k)};
}
template <Rescaling rescaling>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rope_backward_formula(
    const BackwardCall& call) {
  constexpr const char* op = "rms_norm_rope_backward";
  const Call forward = call.forward();
  const std::vector<Side> sides = checked_sides(op, forward);
  const OptionalTensor* const grads[] = {&call.grad_q, &call.grad_k};
  Tensor dx[2], dweight[2];
  for (size_t i = 0; i < sides.size(); ++i) {
    if (!*grads[i]) continue;
    const SideFormula formula(op, rescaling, sides[i], forward);
    std::tie(dx[i], dweight[i]) =
        formula.backward(**grads[i], {call.output_mask[i], call.output_mask[2 + i]});
  }
  return {dx[0], dx[1], dweight[0], dweight[1]};
}

// ------------------------------------------------------------------------------------ recorded

struct Record : torch::autograd::Function<Record> {
  static constexpr bool is_traceable = true;  // as in rms_norm.cpp

  // Tensors that are rotated by, and rstd, go by pointer: they have no gradient.
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const OptionalTensor& k,
                               const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                               const Call* call, std::array<Tensor, 2>* rstd) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto& [_q, _k, _q_weight, _k_weight, cos, sin, positions, eps, options] = *call;
    Tensor q_out, k_out;
    std::tie(q_out, k_out, (*rstd)[0], (*rstd)[1]) = ops::rms_norm_rope_forward::call(
        q, k, q_weight, k_weight, cos, sin, positions, eps, options.heads_dim, options.interleaved,
        options.sections, options.interleaved_sections, options.weight_offset,
        options.cast_before_weight, options.round_each_step);
    ctx->save_for_backward({q, k.value_or(Tensor()), q_weight.value_or(Tensor()),
                            k_weight.value_or(Tensor()), cos, sin, positions.value_or(Tensor()),
                            (*rstd)[0], (*rstd)[1]});
    ctx->set_materialize_grads(false);
    if (!k) ctx->mark_non_differentiable({k_out});
    save(ctx, call->norm());
    auto& data = ctx->saved_data;
    if (options.heads_dim == -3) data["heads_first"] = true;
    if (options.interleaved) data["interleaved"] = true;
    if (options.sections) data["sections"] = options.sections->vec();
    if (options.interleaved_sections) data["interleaved_sections"] = true;
    if (options.round_each_step) data["round_each_step"] = true;
    return {q_out, k_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor k = optional(saved[1]), q_weight = optional(saved[2]),
                         k_weight = optional(saved[3]);
    // Absent tensors are not counted.
    const size_t of_k = 1, of_q_weight = of_k + k.has_value(),
                 of_k_weight = of_q_weight + q_weight.has_value();
    const auto& data = ctx->saved_data;
    const auto is_set = [&](const char* name) { return data.count(name) > 0; };
    const auto sections = data.find("sections");
    const std::vector<int64_t> sizes =
        sections == data.end() ? std::vector<int64_t>() : sections->second.toIntVector();
    const NormOptions norm = saved_options(ctx);
    auto [dq, dk, dq_weight, dk_weight] = ops::rms_norm_rope_backward::call(
        optional(grads[0]), k ? optional(grads[1]) : std::nullopt, saved[0], k, q_weight, k_weight,
        saved[4], saved[5], optional(saved[6]), saved[7], saved[8], norm.eps,
        {ctx->needs_input_grad(0), k && ctx->needs_input_grad(of_k),
         q_weight && ctx->needs_input_grad(of_q_weight),
         k_weight && ctx->needs_input_grad(of_k_weight)},
        is_set("heads_first") ? -3 : -2, is_set("interleaved"),
        sections == data.end() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(sizes),
        is_set("interleaved_sections"), norm.weight_offset, norm.cast_before_weight,
        is_set("round_each_step"));
    return {dq, dk, dq_weight, dk_weight, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> record_forward(const Call& call) {
  // The gradient of an angle is one that ATen finds.
  if (call.cos.requires_grad() || call.sin.requires_grad()) {
    return rms_norm_rope_forward_formula<Rescaling::kRescaled>(call);
  }
  std::array<Tensor, 2> rstd;
  const variable_list y = Record::apply(call.q, call.k, call.q_weight, call.k_weight, &call, &rstd);
  return {y[0], y[1], rstd[0], rstd[1]};
}
std::tuple<Tensor, Tensor> record(const Call& call) {
  auto [q, k, q_rstd, k_rstd] = record_forward(call);
  return {std::move(q), std::move(k)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rmsnorm_cuda, m) {
  if (registered_elsewhere()) return;
  constexpr auto kPlain = Rescaling::kPlain, kRescaled = Rescaling::kRescaled;
  const std::string options =
      "*, int heads_dim=-2, bool interleaved=False, int[]? sections=None, "
      "bool interleaved_sections=False, float weight_offset=0.0, bool cast_before_weight=False, "
      "bool round_each_step=False";
  const std::string rest =
      "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions=None, "
      "float? eps=None, " +
      options;
  const std::string arguments = "Tensor q, Tensor? k, " + rest;
  ops::rms_norm_rope::define<rms_norm_rope, rms_norm_rope_formula<kRescaled>, record,
                             rms_norm_rope_formula<kPlain>>(m, arguments,
                                                            "(Tensor q_out, Tensor k_out)");
  ops::rms_norm_rope_forward::define<rms_norm_rope_forward<true>,
                                     rms_norm_rope_forward_formula<kRescaled>, record_forward,
                                     rms_norm_rope_forward_formula<kPlain>>(
      m, arguments, "(Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)");
  ops::rms_norm_rope_backward::define<
      rms_norm_rope_backward, rms_norm_rope_backward_formula<kRescaled>,
      rms_norm_rope_backward_formula<kRescaled>, rms_norm_rope_backward_formula<kPlain>>(
      m,
      "Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, "
      "Tensor cos, Tensor sin, Tensor? positions, Tensor q_rstd, Tensor k_rstd, float? eps, "
      "bool[4] output_mask, " +
          options,
      "(Tensor grad_q, Tensor grad_k, Tensor grad_q_weight, Tensor grad_k_weight)");
  ops::rms_norm_rope_::define<rms_norm_rope_>(m, "Tensor(a!) q, Tensor(b!)? k, " + rest, "()");
  ops::rms_norm_rope_out::define<rms_norm_rope_out>(
      m, arguments + ", Tensor(a!) q_out, Tensor(b!) k_out", "()");
}

}  // namespace rmsnorm

// The rows that fp32 cannot do: fp64 tensors, and rows so large, tiny or broken (Inf, NaN) that
// their sum of squares leaves the range of the fast path. And, as the instruction set "fp64", every
// row: what the fast paths are held against. Exactness counts here, speed does not.
#include <algorithm>
#include <cmath>
#include <optional>

#include "../round_to_odd.h"
#include "kernels.h"

namespace rmsnorm::cpu {
namespace {

constexpr DType kDouble = DType::kFloat64;

double half_to_double(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
  const int units = exponent ? fraction | 0x400 : fraction;
  const double magnitude =
      exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(units, std::max(exponent, 1) - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Every NaN is the same one, whichever the row held first.
uint16_t to_bfloat16(double value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = __builtin_bit_cast(uint32_t, round_to_odd(value));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_half(double value) {
  if (value != value) return 0x7e00;
  const uint32_t bits = __builtin_bit_cast(uint32_t, round_to_odd(value));
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and above
  if (rest < 0x38800000)
    return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(value) * 0x1p24)));
  return uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE double load(const void* base, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(base)[i];
    case DType::kFloat16:
      return half_to_double(static_cast<const uint16_t*>(base)[i]);
    case DType::kBFloat16:
      return __builtin_bit_cast(float, uint32_t(static_cast<const uint16_t*>(base)[i]) << 16);
    case DType::kFloat64:
      return static_cast<const double*>(base)[i];
  }
  return 0;
}

// base[begin + i] = value(i) for 0 <= i < count, rounded once.
template <class F>
void store(void* base, DType dtype, int64_t begin, int64_t count, F value) {
  const auto each = [&](auto* out, auto round) {
    for (int64_t i = 0; i < count; ++i) out[begin + i] = round(value(i));
  };
  switch (dtype) {
    case DType::kFloat32:
      return each(static_cast<float*>(base), [](double v) { return v != v ? NAN : float(v); });
    case DType::kFloat16:
      return each(static_cast<uint16_t*>(base), to_half);
    case DType::kBFloat16:
      return each(static_cast<uint16_t*>(base), to_bfloat16);
    case DType::kFloat64:
      return each(static_cast<double*>(base), [](double v) { return v != v ? double(NAN) : v; });
  }
}

double round_to(DType dtype, double value) {
  double rounded;
  store(&rounded, dtype, 0, 1, [=](int64_t) { return value; });
  return load(&rounded, dtype, 0);
}

// A row that is formed first. In fp32, of fp64 tensors in fp64.
struct RowOfSum {
  const Addends* addends;
  DType residual_dtype;
  int64_t input, residual;

  RowOfSum(const RmsNormForward& p, int64_t row)
      : addends(&p.addends),
        residual_dtype(p.x_dtype),
        input(addends->input_rows.offset(row)),
        residual(addends->residual_rows.offset(row)) {}

  double operator[](int64_t i) const {
    const double left = load(addends->input, addends->input_dtype, input + i);
    const double right = load(addends->residual, residual_dtype, residual + i);
    const bool in_double = addends->input_dtype == kDouble || residual_dtype == kDouble;
    return in_double ? left + right : float(left) + float(right);
  }
};

// One row of x, normalized: x * scale is near 1 where x * x would leave the range of double, and
// rstd = scale * unit. The factors are applied one after the other: their product may overflow.
struct Row {
  const void* x;
  DType dtype;
  int64_t offset;
  std::optional<RowOfSum> unrounded;  // what is normalized in x's place
  double scale = 1, unit = 0;

  double operator[](int64_t i) const {
    return (unrounded ? (*unrounded)[i] : load(x, dtype, offset + i)) * scale;
  }
  double xhat(int64_t i) const { return (*this)[i] * unit; }
  double xhat(int64_t i, bool cast) const { return cast ? round_to(dtype, xhat(i)) : xhat(i); }
};

// Each lane keeps what its additions round off (Knuth's two-sum): equal terms would lose thousands
// of ulps in a long row.
template <class Term>
double sum_of(int64_t count, const Term& term) {
  double lanes[8] = {}, lost[8] = {};
  for (int64_t i = 0; i < count; ++i) {
    const double value = term(i), before = lanes[i % 8], sum = before + value;
    const double added = sum - before;
    lanes[i % 8] = sum;
    lost[i % 8] += (before - (sum - added)) + (value - added);
  }
  for (int j = 0; j < 8; ++j) lanes[j] += lost[j] == lost[j] ? lost[j] : 0;  // NaN behind an Inf
  for (int half = 4; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

Row row_of(const RmsNormForward& p, int64_t row) {
  Row x = {p.x, p.x_dtype, p.x_rows.offset(row), std::nullopt};
  if (is_unrounded(p)) x.unrounded.emplace(p, row);
  return x;
}
Row row_of(const RmsNormBackward& p, int64_t row) {
  return {p.x, p.x_dtype, p.x_rows.offset(row), std::nullopt};
}

// The scale does not follow x below sqrt(eps), which is what bounds rstd there: eps * scale^2 stays
// finite.
template <class P>
Row normalize(const P& p, int64_t row) {
  Row x = row_of(p, row);
  double largest = std::sqrt(p.eps);
  for (int64_t i = 0; i < p.cols; ++i) largest = std::fmax(largest, std::fabs(x[i]));
  if (std::isfinite(largest) && largest > 0 && (largest > 0x1p400 || largest < 0x1p-400)) {
    // For denormals 2^1000 is near enough; 2^1074 would overflow.
    x.scale = std::ldexp(1.0, -std::max(std::ilogb(largest), -1000));
  }
  const double sum = sum_of(p.cols, [&](int64_t i) { return x[i] * x[i]; });
  x.unit = 1 / std::sqrt(sum / double(p.cols) + p.eps * x.scale * x.scale);
  return x;
}

// weight + weight_offset, as the fast path forms it: in fp32 unless a tensor is fp64.
template <class P>
INLINE double weight_at(const P& p, int64_t i) {
  if (!p.weight) return 1;
  const double w = load(p.weight, p.w_dtype, i);
  const double offset = addend_of(p.weight_offset);
  return has_fp64(p) ? w + offset : float(w) + float(offset);
}

void forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  set_last_isa("fp64");
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (p.addends.input && !is_unrounded(p)) add_row_fp64(p, row);
    forward_row_fp64(p, row, y_begin);
  }
}

void backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  set_last_isa("fp64");
  const int64_t block_rows = rms_norm_backward_plan(p).block_rows;
  for (int64_t block = block_begin; block < block_end; ++block) {
    double* partial = p.dweight ? static_cast<double*>(p.workspace) + block * p.cols : nullptr;
    if (partial) std::fill_n(partial, p.cols, 0.0);
    const int64_t end = std::min((block + 1) * block_rows, p.rows);
    for (int64_t row = block * block_rows; row < end; ++row) backward_row_fp64(p, row, partial);
  }
}

void dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  const int64_t blocks = rms_norm_backward_plan(p).blocks;
  const double* partials = static_cast<const double*>(p.workspace) + col_begin;
  store(p.dweight, p.w_dtype, col_begin, col_end - col_begin, [&](int64_t i) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partials[block * p.cols + i];
    return sum;
  });
}

// Its arithmetic is fp32 by definition.
void quantize(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  kScalar.quantize(p, row_begin, row_end, y_begin);
}

struct Slope {
  double value, slope;
};
Slope activate(Activation activation, double g) {
  if (activation == kIdentity) return {g, 1};
  const double e = std::exp(-std::fabs(g)), over = g < 0 ? e : 1, under = g < 0 ? 1 : e;
  const double sigmoid = over / (1 + e), rest = under / (1 + e);
  if (activation == Activation::kSigmoid) return {sigmoid, sigmoid * rest};
  return {g * over / (1 + e), sigmoid + g * sigmoid * rest};
}

template <class F>
void store_row(const RowsAt& t, int64_t row, int64_t cols, F value) {
  store(const_cast<void*>(t.data), t.dtype, t.offset(row), cols, value);
}
double load(const RowsAt& t, int64_t row, int64_t i) {
  return load(t.data, t.dtype, t.offset(row) + i);
}

void gate_rows(const GatedRows& r, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    store_row(r.result, row, r.cols, [&](int64_t i) {
      return load(r.v, row, i) * activate(r.activation, load(r.gate, row, i)).value;
    });
  }
}

void gate_gradients(const GatedRows& r, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    store_row(r.dgate, row, r.cols, [&](int64_t i) {
      const double slope = activate(r.activation, load(r.gate, row, i)).slope;
      return load(r.d, row, i) * load(r.v, row, i) * slope;
    });
    store_row(r.result, row, r.cols, [&](int64_t i) {
      return load(r.d, row, i) * activate(r.activation, load(r.gate, row, i)).value;
    });
  }
}

// Angles of fp64 beside fp32 are rounded first.
void rotate(const Rope& rope, const RotatedRows& r, int64_t row_begin, int64_t row_end) {
  const bool fp64 = r.from_dtype == kDouble || r.to_dtype == kDouble;
  const bool each = rope.round_each_step && !r.reversed;
  const DType step = rope.step_dtype(r.to_dtype);
  const auto rounded = [&](double v) { return each ? round_to(step, v) : v; };
  const int64_t cols = r.head_cols, pairs = rope.pairs, apart = rope.interleaved ? 1 : pairs;
  for (int64_t i = row_begin * r.heads_per_row; i < row_end * r.heads_per_row; ++i) {
    const int64_t row = i / r.heads_per_row, column = i % r.heads_per_row * cols;
    const int64_t token = row / r.rows_per_token;
    const int64_t from = r.from_rows.offset(row - r.from_begin) + column;
    const int64_t to = r.to_rows.offset(row - r.to_begin) + column;
    const auto x = [&](int64_t c) { return load(r.from, r.from_dtype, from + c); };
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t at = rope.offset(token, rope.axis_count == 1 ? 0 : rope.axes[pair]) + pair;
      const auto angle = [&](const void* table) {
        const double value = load(table, rope.dtype, at);
        return fp64 ? value : double(float(value));
      };
      const double cos = angle(rope.cos), sin = r.reversed ? -angle(rope.sin) : angle(rope.sin);
      const int64_t c = rope.interleaved ? 2 * pair : pair;
      const double a = x(c), b = x(c + apart);
      const double turned[] = {rounded(rounded(a * cos) - rounded(b * sin)),
                               rounded(rounded(b * cos) + rounded(a * sin))};
      store(r.to, r.to_dtype, to + c, 1, [&](int64_t) { return turned[0]; });
      store(r.to, r.to_dtype, to + c + apart, 1, [&](int64_t) { return turned[1]; });
    }
    const int64_t rest = 2 * pairs;
    store(r.to, r.to_dtype, to + rest, cols - rest, [&](int64_t c) { return x(rest + c); });
  }
}

}  // namespace

bool has_fp64(const RmsNormForward& p) {
  return p.x_dtype == kDouble || p.y_dtype == kDouble || (p.weight && p.w_dtype == kDouble);
}

bool has_fp64(const RmsNormBackward& p) {
  const bool weighted = p.weight || p.dweight;
  return p.x_dtype == kDouble || p.dy_dtype == kDouble || (weighted && p.w_dtype == kDouble);
}

void add_row_fp64(const RmsNormForward& p, int64_t row) {
  const RowOfSum sum(p, row);
  store(const_cast<void*>(p.x), p.x_dtype, p.x_rows.offset(row), p.cols,
        [&](int64_t i) { return sum[i]; });
}

double sum_of_squares_fp64(const RmsNormForward& p, int64_t row) {
  const RowOfSum sum(p, row);
  return sum_of(p.cols, [&](int64_t i) { return sum[i] * sum[i]; });
}

void forward_row_fp64(const RmsNormForward& p, int64_t row, int64_t y_begin) {
  const Row x = normalize(p, row);
  // As the bits of the steps: the norm of a sum in fp32 is in fp32 before it takes input's dtype.
  const bool narrows = p.x_dtype == DType::kFloat32 && p.y_dtype != kDouble;
  store(p.y, p.y_dtype, p.y_rows.offset(row - y_begin), p.cols, [&](int64_t i) {
    const double y = x.xhat(i, p.cast_before_weight) * weight_at(p, i);
    if (x.unrounded) {  // each element before y takes the place of its addend
      const double sum = (*x.unrounded)[i];
      store(const_cast<void*>(p.x), p.x_dtype, x.offset + i, 1, [=](int64_t) { return sum; });
    }
    return narrows ? float(y) : y;
  });
  if (!p.rstd) return;
  const DType rstd_dtype = p.x_dtype == kDouble ? kDouble : DType::kFloat32;
  store(p.rstd, rstd_dtype, row, 1, [&](int64_t) { return x.unit * x.scale; });
}

void weight_row_fp64(const RmsNormForward& p, DType to_dtype, void* to) {
  RmsNormForward of_type = p;
  if (to_dtype == kDouble) of_type.y_dtype = kDouble;
  store(to, to_dtype, 0, p.cols, [&](int64_t i) { return weight_at(of_type, i); });
}

template <class T>
void backward_row_fp64(const RmsNormBackward& p, int64_t row, T* partial) {
  const Row x = normalize(p, row);
  const int64_t dy_offset = p.dy_rows.offset(row);
  const int64_t dresidual = p.dresidual ? p.dresidual_rows.offset(row) : 0;
  const auto dy = [&](int64_t i) { return load(p.dy, p.dy_dtype, dy_offset + i); };
  const bool cast = p.cast_before_weight;
  for (int64_t i = 0; i < (partial ? p.cols : 0); ++i) {
    partial[i] = T(partial[i] + dy(i) * x.xhat(i, cast));
  }
  if (!p.dx) return;
  const double sum = sum_of(p.cols, [&](int64_t i) { return weight_at(p, i) * dy(i) * x.xhat(i); });
  const double mean = sum / double(p.cols);
  store(p.dx, p.x_dtype, row * p.cols, p.cols, [&](int64_t i) {
    const double dx = (weight_at(p, i) * dy(i) - x.xhat(i) * mean) * x.unit * x.scale;
    return p.dresidual ? dx + load(p.dresidual, p.x_dtype, dresidual + i) : dx;
  });
}
template void backward_row_fp64(const RmsNormBackward&, int64_t, float*);

const Kernels kFp64 = {"fp64",    forward,        backward, dweight, quantize,
                       gate_rows, gate_gradients, rotate,   nullptr};

}  // namespace rmsnorm::cpu

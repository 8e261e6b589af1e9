// Rows that are multiplied by the activation of a gate: what is normalized, a norm that lies in a
// tile, or gradients.
#pragma once
#include "sum.inl"

// e^x of x <= 0, within 1 ulp.
INLINE V exp_of_negative(V x) {
  const V lowest = set1(-104.0f), whole = set1(0x1.8p23f);  // e^-104 is 0; its units are 1
  x = Isa::at_least(x, lowest);
  const V shifted = Isa::fma(x, set1(0x1.715476p0f), whole), n = shifted - whole;
  // ln 2 in two parts: n times the first is exact.
  const V r = Isa::fma(n, set1(-0x1.7f7d1cp-20f), Isa::fma(n, set1(-0x1.62e4p-1f), x));
  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, within 2^-28 of e^r (a minimax polynomial).
  V p = set1(0x1.6a23cep-10f);
  p = Isa::fma(p, r, set1(0x1.123a20p-7f));
  p = Isa::fma(p, r, set1(0x1.5558f2p-5f));
  p = Isa::fma(p, r, set1(0x1.555492p-3f));
  p = Isa::fma(p, r, set1(0x1.fffffcp-2f));
  p = Isa::fma(p, r, set1(1.0f));
  return Isa::scale_down(Isa::fma(p, r, set1(1.0f)), n);
}

// sigmoid(g) = e / (1 + e) with e = e^g, in which nothing overflows if e is that of -|g|.
struct Sigmoid {
  V over, under, sum;  // over / sum, and one less that is under / sum

  INLINE explicit Sigmoid(V g) {
    const V one = set1(1.0f), e = exp_of_negative(V(I32(g) | int32_t(0x80000000)));
    over = g < V{} ? e : one;
    under = g < V{} ? one : e;
    sum = one + e;
  }
};

template <Activation kActivation>
INLINE V activated(V g, const Sigmoid& s) {
  return (kActivation == Activation::kSilu ? g * s.over : s.over) / s.sum;
}
template <Activation kActivation>
INLINE V activated(V g) {
  if constexpr (kActivation == kIdentity) return g;
  return activated<kActivation>(g, Sigmoid(g));
}

struct Slope {
  V value, slope;
};
template <Activation kActivation>
INLINE Slope with_slope(V g) {
  const Sigmoid s(g);
  const V value = activated<kActivation>(g, s), inverse = set1(1.0f) / s.sum;
  const V sigmoid = s.over * inverse, rest = s.under * inverse;
  if constexpr (kActivation == Activation::kSigmoid) return {value, sigmoid * rest};
  return {value, Isa::fma(g * sigmoid, rest, sigmoid)};
}

template <class F>
INLINE void with_activation(Activation activation, F f) {
  if (activation == kIdentity) return f(Constant<kIdentity>());
  if (activation == Activation::kSilu) return f(Constant<Activation::kSilu>());
  f(Constant<Activation::kSigmoid>());
}

// Columns that are worked on at a time, as floats: their dtypes are apart from what is computed.
constexpr int kSpan = 256;
using Span = float[kSpan];

// As floats: where they lie, or in the buffer.
INLINE const float* floats(const RowsAt& t, int64_t at, int64_t n, Span& buffer) {
  if (t.dtype == DType::kFloat32) return static_cast<const float*>(t.data) + at;
  with_type(t.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(t.data) + at;
    for_each_vector(0, n, [&](int64_t i, int m) { store(buffer + i, load(from + i, m), m); });
  });
  return buffer;
}

// Whole vectors past the caches, if that is asked for.
template <class T>
INLINE void put(T* p, V v, int n, bool streams) {
  if (Isa::kStreams && streams && n == kLanes) return write<Isa::kStreams>(p, v, n);
  store(p, v, n);
}
INLINE bool may_stream(const RowsAt& t, bool is_wanted) {
  bool streams = false;
  if (is_wanted) {
    with_type(t.dtype, [&](auto type) { streams = streamable<decltype(type)>(t.data, t.rows); });
  }
  return streams;
}

// Where floats of t are written to: its own memory, or the buffer, which narrow_to() then stores.
INLINE float* floats_for(const RowsAt& t, int64_t at, Span& buffer) {
  void* const data = const_cast<void*>(t.data);
  return t.dtype == DType::kFloat32 ? static_cast<float*>(data) + at : buffer;
}
INLINE void narrow_to(const RowsAt& t, int64_t at, int64_t n, const Span& buffer, bool streams) {
  if (t.dtype == DType::kFloat32) return;
  with_type(t.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(const_cast<void*>(t.data)) + at;
    for_each_vector(0, n, [&](int64_t i, int m) { put(to + i, load(buffer + i, m), m, streams); });
  });
}

// The n columns from `begin` on of the rows that the next tile begins with.
INLINE void fetch(const GatedRows& rows, int64_t row, int64_t begin, int64_t n) {
  if (row + rows.ahead >= rows.fetch_end) return;
  const RowsAt* const fetched[] = {rows.fetch_x, rows.fetch_gate};
  for (const RowsAt* t : fetched) {
    if (!t) continue;
    const int64_t size = size_of(t->dtype), at = (t->offset(row + rows.ahead) + begin) * size;
    const char* const from = static_cast<const char*>(t->data) + at;
    for (int64_t i = 0; i < n * size; i += kLine) __builtin_prefetch(from + i, 0, 2);
  }
}

void gate_rows(const GatedRows& rows, int64_t row_begin, int64_t row_end) {
  with_activation(rows.activation, [&](auto activation) {
    alignas(kLine) Span v_buffer, gate_buffer, buffer;
    const bool streams = may_stream(rows.result, rows.stream);
    for (int64_t row = row_begin; row < row_end; ++row) {
      for (int64_t begin = 0; begin < rows.cols; begin += kSpan) {
        const int64_t n = rows.cols - begin < kSpan ? rows.cols - begin : kSpan;
        fetch(rows, row, begin, n);
        const float* v = floats(rows.v, rows.v.offset(row) + begin, n, v_buffer);
        const float* gate = floats(rows.gate, rows.gate.offset(row) + begin, n, gate_buffer);
        const int64_t at = rows.result.offset(row) + begin;
        float* to = floats_for(rows.result, at, buffer);
        for_each_vector(0, n, [&](int64_t i, int m) INLINE_LAMBDA {
          const V a = activated<activation.value>(load(gate + i, m));
          put(to + i, canonical(load(v + i, m) * a), m, streams && to != buffer);
        });
        narrow_to(rows.result, at, n, buffer, streams);
      }
    }
    if (streams) Isa::fence();
  });
}

void gate_gradients(const GatedRows& rows, int64_t row_begin, int64_t row_end) {
  with_activation(rows.activation, [&](auto activation) {
    alignas(kLine) Span d_buffer, v_buffer, gate_buffer, buffer, dgate_buffer;
    const bool streams = may_stream(rows.dgate, rows.stream);
    for (int64_t row = row_begin; row < row_end; ++row) {
      for (int64_t begin = 0; begin < rows.cols; begin += kSpan) {
        const int64_t n = rows.cols - begin < kSpan ? rows.cols - begin : kSpan;
        const float* d = floats(rows.d, rows.d.offset(row) + begin, n, d_buffer);
        const float* v = floats(rows.v, rows.v.offset(row) + begin, n, v_buffer);
        const float* gate = floats(rows.gate, rows.gate.offset(row) + begin, n, gate_buffer);
        const int64_t at = rows.result.offset(row) + begin;
        const int64_t dgate_at = rows.dgate.offset(row) + begin;
        float* to = floats_for(rows.result, at, buffer);
        float* dgate = floats_for(rows.dgate, dgate_at, dgate_buffer);
        for_each_vector(0, n, [&](int64_t i, int m) INLINE_LAMBDA {
          const Slope a = with_slope<activation.value>(load(gate + i, m));
          const V upstream = load(d + i, m), gated = load(v + i, m);
          put(dgate + i, canonical(upstream * gated * a.slope), m,
              streams && dgate != dgate_buffer);
          store(to + i, canonical(upstream * a.value), m);
        });
        narrow_to(rows.result, at, n, buffer, false);
        narrow_to(rows.dgate, dgate_at, n, dgate_buffer, streams);
      }
    }
    if (streams) Isa::fence();
  });
}

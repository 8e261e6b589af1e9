// y in 8 bits: see Quant in rmsnorm.h.
#pragma once
#include "sum.inl"

typedef uint16_t Lanes16 __attribute__((vector_size(sizeof(V)), may_alias));
typedef uint16_t HalfLanes16 __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));

INLINE V magnitude(V v) { return V(I32(v) & 0x7fffffff); }
INLINE I32 larger(I32 a, I32 b) { return a > b ? a : b; }

// The formats of a QType: the codes of v, saturated and rounded to nearest even, in the lowest
// bytes, with kOffset added; and two of them side by side in the lower halves. What is above is
// anything. kPlain: v is known to be a number that is in the range once rounded.
template <int kFraction, int kBias>
struct Float8 {
  static constexpr bool kDivides = true;
  static constexpr float kMaxValue =
      max_value(kFraction == 3 ? QType::kFloat8E4M3 : QType::kFloat8E5M2);
  static constexpr int kMinExponent = 128 - kBias;  // of a float, of the smallest normal number
  static constexpr int32_t kOffset = kMinExponent << kFraction;

  template <bool kPlain>
  static INLINE I32 code(V v) {
    const I32 sign = I32(v) >> 24 & 0x80;
    I32 bits = I32(magnitude(v));
    if constexpr (!kPlain) {
      const I32 limit = I32(set1(kMaxValue));
      bits = bits < limit ? bits : limit;
    }
    // The sum with a number so much greater is rounded in units of the code, which it counts in its
    // lowest bits.
    const I32 exponent = larger(bits & 0x7f800000, I32{} + (kMinExponent << 23));
    const I32 sum = I32(V(bits) + V(exponent + ((23 - kFraction) << 23)));
    const I32 code = sum + (exponent >> (23 - kFraction));
    if constexpr (!kPlain) return (v == v ? code : I32{} + (0x7f + kOffset)) + sign;
    return code + sign;
  }
  static INLINE I32 pair(I32 low, I32 high) { return low + (high << 8) - kOffset * 0x101; }
};
struct Int8 {
  static constexpr bool kDivides = false;
  static constexpr float kMaxValue = max_value(QType::kInt8);
  static constexpr int32_t kOffset = 0;

  template <bool kPlain>
  static INLINE I32 code(V v) {
    if constexpr (!kPlain) {
      const V lowest = set1(-kMaxValue - 1), highest = set1(kMaxValue);
      v = v < lowest ? lowest : v;
      v = v > highest ? highest : v;
      v = v == v ? v : V{};
    }
    return I32(v + set1(0x1.8p23f));  // whose units are 1
  }
  static INLINE I32 pair(I32 low, I32 high) { return (low & 0xff) | high << 8; }
};

// The largest |p[i]|, NaN if there is one: as integers they are in the same order.
template <class T>
INLINE float largest_magnitude(const T* p, int64_t n) {
  I32 largest = {};
  int64_t i = 0;
  if constexpr (!kIsFloat<T>) {
    Lanes16 largest_16 = {};
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      Lanes16 words;
      __builtin_memcpy(&words, p + i, sizeof words);
      words &= 0x7fff;
      largest_16 = words > largest_16 ? words : largest_16;
    }
    // Each half of a lane as a number of T.
    const I32 both = I32(largest_16), lanes = larger(both & 0xffff, both >> 16);
    const auto bits = reinterpret_cast<Bits16>(__builtin_convertvector(lanes, HalfLanes16));
    largest = I32(widen(bits, T()));
  }
  for (; i < n; i += kLanes) {
    largest = larger(largest, I32(magnitude(load(p + i, i + kLanes <= n ? kLanes : int(n - i)))));
  }
  return __builtin_bit_cast(float, largest_lane(V(largest)));
}

template <class F, bool kPlain, class T, class Scaled>
INLINE void quantize_span(const T* from, uint8_t* to, int64_t n, Scaled scaled) {
  int64_t i = 0;
  if constexpr (kIsBFloat16<T>) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair v = split(from + i);
      const I32 even = F::template code<kPlain>(scaled(v.even));
      const I32 odd = F::template code<kPlain>(scaled(v.odd));
      const HalfLanes16 both = __builtin_convertvector(F::pair(even, odd), HalfLanes16);
      __builtin_memcpy(to + i, &both, sizeof both);
    }
  }
  for (; i < n; i += kLanes) {
    const int m = i + kLanes <= n ? kLanes : int(n - i);
    const I32 code = F::template code<kPlain>(scaled(load(from + i, m))) - F::kOffset;
    // In two steps: GCC 12 would take one element by element.
    const Bytes codes = __builtin_convertvector(__builtin_convertvector(code, HalfLanes16), Bytes);
    m == kLanes ? __builtin_memcpy(to + i, &codes, kLanes) : __builtin_memcpy(to + i, &codes, m);
  }
}

template <class F, class T>
void quantize_rows(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  const Quant& q = p.quant;
  const int64_t width = q.block ? q.block : p.cols;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* from = static_cast<const T*>(p.y) + p.y_rows.offset(row - y_begin);
    uint8_t* to = static_cast<uint8_t*>(q.data) + row * p.cols;
    for (int64_t begin = 0; begin < p.cols; begin += width) {
      float scale = q.block ? 0 : *q.scale;  // dynamic ones are written by other threads meanwhile
      bool plain = false;
      if (q.block) {
        const float largest = largest_magnitude(from + begin, width);
        plain = largest <= q.bound && largest < __builtin_inff();
        scale = (largest > q.bound ? q.bound : largest) / F::kMaxValue;
        scale = scale < q.least ? q.least : scale;
        q.scale[row * q.row_stride + begin / width * q.block_stride] = scale;
      }
      const V s = set1(scale), over_s = set1(1.0f / scale), minus_over_s = -over_s;
      const auto product = [=](V v) INLINE_LAMBDA { return v * over_s; };
      const auto quotient = [=](V v) INLINE_LAMBDA { return v / s; };
      const auto quotient_of_plain = [=](V v) INLINE_LAMBDA {
        if constexpr (Isa::kFma) {
          // Rounded as a division is: over_s is 1 / s rounded once, and one step from there
          // (Markstein 1990) is exact. In this order of signs 0 keeps its own.
          const V near = v * over_s;
          return Isa::fma(Isa::fmsub(near, s, v), minus_over_s, near);
        } else {
          return v / s;
        }
      };
      const auto span = [&](auto plain, auto scaled) {
        quantize_span<F, plain.value>(from + begin, to + begin, width, scaled);
      };
      if (F::kDivides && q.block) {
        plain ? span(Constant<true>(), quotient_of_plain) : span(Constant<false>(), quotient);
      } else {
        !F::kDivides&& plain ? span(Constant<true>(), product) : span(Constant<false>(), product);
      }
    }
  }
}

// Of y, which forward() wrote.
void quantize(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  with_type(p.y_dtype, [&](auto y) {
    const auto as = [&](auto format) {
      quantize_rows<decltype(format), decltype(y)>(p, row_begin, row_end, y_begin);
    };
    if (p.quant.dtype == QType::kInt8) return as(Int8());
    p.quant.dtype == QType::kFloat8E4M3 ? as(Float8<3, 7>()) : as(Float8<2, 15>());
  });
}

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rmsnorm.h"

namespace rmsnorm {

// v as a float that rounds to 16 bits as v itself would: towards zero, and odd where that was not
// exact.
RMSNORM_HOST_DEVICE inline float round_to_odd(double v) {
  float result = static_cast<float>(v);
  if (result == v || v != v) return result;
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof bits);
  if (std::fabs(static_cast<double>(result)) > std::fabs(v)) --bits;
  bits |= 1;
  std::memcpy(&result, &bits, sizeof bits);
  return result;
}

}  // namespace rmsnorm

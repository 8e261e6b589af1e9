// What every kernel adds to a weight.
#pragma once
#include "rmsnorm.h"

namespace rmsnorm {

// -0 for an offset of 0: it changes no bit of a weight, where 0 would make a 0 of -0.
RMSNORM_HOST_DEVICE constexpr double addend_of(double weight_offset) {
  return weight_offset == 0 ? -0.0 : weight_offset;
}

}  // namespace rmsnorm

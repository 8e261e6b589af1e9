// The first n of kLanes elements from p on, as bytes: no alignment and no aliasing rule to keep.
// The remainder of a row has many of the incomplete ones, which are out of line for that.
#pragma once

template <class Vec>
__attribute__((noinline)) Vec load_part(const void* p, int n) {
  Vec v = {};
  __builtin_memcpy(&v, p, n * sizeof v / kLanes);
  return v;
}
template <class Vec>
INLINE Vec load_bytes(const void* p, int n) {
  if (n != kLanes) return load_part<Vec>(p, n);
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class Vec>
__attribute__((noinline)) void store_part(void* p, Vec v, int n) {
  __builtin_memcpy(p, &v, n * sizeof v / kLanes);
}
template <class Vec>
INLINE void store_bytes(void* p, Vec v, int n) {
  if (n != kLanes) return store_part(p, v, n);
  __builtin_memcpy(p, &v, sizeof v);
}

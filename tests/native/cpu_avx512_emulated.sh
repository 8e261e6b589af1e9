#!/bin/sh
# cpu_check with csrc/cpu/isa_avx512.cpp compiled as AVX2 code: all tests of AVX-512 but its speed.
#   tests/native/cpu_avx512_emulated.sh [folder for the build]
set -e
here=$(cd "$(dirname "$0")" && pwd)
cpu=$here/../../csrc/cpu
build=${1:-$(mktemp -d)}
cxx="${CXX:-g++} -std=c++17 -O2 -ffp-contract=off -Wno-psabi"
sed -e 's/#pragma GCC target("avx512.*/#pragma GCC target("avx2,fma,f16c")/' \
  -e '/asm("" : "+v"(v));/d' "$cpu/isa_avx512.cpp" > "$build/isa_avx512.cpp"
$cxx -I"$cpu" -include "$here/cpu_avx512_emulated.h" -c "$build/isa_avx512.cpp" \
  -o "$build/isa_avx512.o"
$cxx -D'__builtin_cpu_supports(feature)=1' -c "$cpu/dispatch.cpp" -o "$build/dispatch.o"
$cxx "$here/cpu_check.cpp" "$cpu/isa_scalar.cpp" "$cpu/isa_avx2.cpp" "$cpu/fp64.cpp" \
  "$cpu/gated.cpp" "$build/isa_avx512.o" "$build/dispatch.o" -o "$build/cpu_check"
"$build/cpu_check"

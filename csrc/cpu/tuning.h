// Thresholds of the CPU kernels. None of them changes a result.
#pragma once
#include <cstdint>

namespace rmsnorm::cpu {

constexpr int kLine = 64;  // bytes in a line of the caches

// What the machine says at start, or the usual where it says nothing, in bytes: the data caches of
// a core, and the last level that it shares with others. A virtual machine may be told of all of
// the host's, of which it has a share: no more than 32 MiB are counted on.
struct CacheSizes {
  int64_t l1, l2, l3;
};
extern const CacheSizes kCaches;  // dispatch.cpp

constexpr int64_t between(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// A backward that reads and writes so much finds its next row in memory rather than in a cache. Its
// rows are fetched ahead, which in fp32 takes up to 15 % less time here and up to 11 % more below
// it; 16-bit rows are always fetched: cold ones take 10 % less time, others as long (Emerald
// Rapids, one core). And rows are not put in groups, which in fp32 take 5 % longer in memory and 10
// % less in a cache (32x4096).
constexpr int64_t kFarBytes = 8 << 20;

// A row of so many bytes is long, see Prefetch. Time over that of this quarter of an L1 cache, data
// of the call before in the caches and out of memory: with an eighth fp32 512x2048 1.06 and 0.99,
// its fused addition 1.03 and 1.04, bf16 512x4096 0.90 and 0.94, its fused addition 1.03 and 1.04;
// with a half fp32 512x4096 0.97 and 0.96, its fused addition 1.12 and 1.10, bf16 128x8192 1.14 and
// 1.01, its fused addition 1.09 and 1.06. That rows of a sum are fetched, which long ones of fp32
// were before, is, out of memory and in the caches: bf16 512x4096, 8 KiB, 0.81 and 1.01 times the
// time, 1024x768 0.80 and 0.92, 16384x64 0.83 and 0.98; fp32 1024x768 0.81 and 0.95, 16384x64 0.79
// and 0.95 (one core of an Emerald Rapids; with AVX2 0.75 to 1.0 and 0.93 to 1.07).
inline int64_t long_row_bytes() { return kCaches.l1 / 4; }

// Rows that are summed as a group, see schedule_rows: a part of an L1 cache. The next row is
// fetched, wherever it may lie. One core of an Emerald Rapids, time over that of
// groups of 24 KiB that fetch nothing; data of the call before in the caches, and in memory: fp32
// 32x4096 1.06 and 0.87, 1024x768 0.95 and 0.93, 512x512 0.89 and 0.88, 2048x64 1.01 and 0.89; bf16
// 32x4096 1.03 and 0.79, 1024x768 0.89 and 0.82, 512x512 0.98 and 0.85, 2048x64 1.00 and 0.87. 2
// KiB take more in bf16 1024x768, 0.98 and 0.89; 4 KiB in a fused addition of fp32 1024x768, 1.08
// where 6 KiB take 0.99.
constexpr int64_t kGroupBytes = 6 << 10;

// So many bytes, and rows at most, is one that is fetched ahead of one that is summed. One core of
// an Emerald Rapids, out of memory, time over that of 4 rows: fused addition in fp32 16384x64 8
// rows 0.90, 1 row 1.12; 4096x256 2 rows 1.03, 1 row 1.12; forward 16384x64 8 rows 0.82. In the
// caches, 8 rows and 1: forward 1024x768 1.03 and 0.94, 2048x512 1.05 and 0.94.
constexpr int64_t kAheadBytes = 3 << 10, kMostAhead = 8;

// Rows that are normalized before they are put into 8 bits, or rotated: an eighth of an L2 cache.
// Over half an L1 cache, 24 KiB of an Emerald Rapids, that is in 8 bits, in the caches and out of
// memory: 32x4096 0.92 to 0.99 and 0.87 to 0.92, 512x4096 0.88 to 0.95. With 6 KiB it is 1.0 to
// 1.2; with 96 and 512 KiB as with these 256.
inline int64_t tile_bytes() { return kCaches.l2 / 8; }

// Rows of a group that are normalized before they are gated, or the other way about.
inline int64_t gated_tile_bytes() { return kCaches.l1 / 3; }
constexpr int64_t kLeastGatedRows = 4;

// An output of so many bytes is written past the caches, which would have to read every line first.
// fp32, one core of a Zen 2 with 16 MiB of L3, us for an output of 4, 6, 8, 12 MiB: 240, 474, 959,
// 1932 through the caches, 247, 380, 536, 1136 past them; with a pass that reads the output next
// 333, 777, 1310, 3088 and 541, 937, 1441, 2524. A caller's own buffer is judged by the first; a
// larger bound than 4 MiB was not measured. A new tensor is judged by the second: it often gets the
// memory of one that was freed a moment ago and is in a cache. From 32 MiB on
// (DEFAULT_MMAP_THRESHOLD_MAX) glibc maps a new one afresh on every call, and the kernel clears its
// pages: 47 ms for 40 MiB through the caches, 62 past them.
inline int64_t stream_bytes() { return between(kCaches.l3 / 4, 1 << 20, 4 << 20); }
inline int64_t new_stream_bytes() { return kCaches.l3 / 2; }
constexpr int64_t kMappedBytes = 32 << 20;

// Of these the kernel has so many bytes mapped at a time, just before it writes them, instead of a
// page at each first touch. One core of an Emerald Rapids, fp32 2048x4096, ms: 17.1 by first
// touches; 13.3, 12.6, 12.4, 12.4, 12.1 with 128, 256, 512 KiB, 1, 2 MiB at a time. Where the
// system gives huge pages, which our torch layer asks for, 8.0 by first touches and 7.0 with 256
// KiB. Where the pages are there, 5.7.
constexpr int64_t kMapAtOnce = 256 << 10;

// Columns of a weight that are turned into floats at a time. With 2048 the backward of bf16
// 256x8192 takes 1.05 times as long; with 32768 that of rows that are longer takes 0.92 to 0.98,
// for 128 KiB of each thread (one core of an Emerald Rapids).
constexpr int64_t kWeightTile = 8192;

// A 16-bit weight of more than these is read as it is, not from a tile of floats. With 1024 bf16
// 32x2048 takes 1.05 times as long in the caches and as long out of memory. With 4096 bf16 32x4096
// takes 0.93 and 1.04, and 512x4096, which is written past them, 1.05. Half, whose
// conversions take more, may have a tile of a third of an L1 cache where y is not written past it:
// fp16 32x4096 takes 0.85 times as long by it in the caches, 1.02 out of memory, and 512x4096,
// which is written past them, 1.05 (one core of an Emerald Rapids).
constexpr int64_t kDirectCols = 2048;
inline int64_t half_tile_cols() { return kCaches.l1 / 12; }

// The backward's groups of rows, see BackwardBlocks, and columns at a time. One core of an Emerald
// Rapids: 32x16384 takes 1.05 to 1.19 times as long with a 16th of the L2 cache, 1.0 to 1.07 with
// an eighth, as long with half of it; 32x4096 with 4 rows 1.05 in the caches and 0.95 out of
// memory, with 64 as long; bf16 1024x768 with 512 columns 1.3, 32x4096 in the caches with 4096
// columns 1.17.
inline int64_t gradient_bytes() { return kCaches.l2 / 4; }
constexpr int64_t kGradientRows = 16;
constexpr int64_t kGradientTile = 1024;

}  // namespace rmsnorm::cpu

// bf16 matrix products on AMX tiles, and the layouts they read.
//
// A block is 32 x 32 bf16 values, 2 KiB, stored row by row. A strip is 32 rows of a matrix as its
// blocks side by side: [columns / 32][32 rows][32 columns]. A product multiplies strips (rows,
// depth) with panels, the second matrix as [columns / 32][depth / 32] blocks whose 16 x 16 pairs of
// consecutive depth values are what the tile instruction reads. Sums are float32.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

constexpr int64_t EDGE = 32;           // rows and columns of a block
constexpr int64_t BLOCK = EDGE * EDGE; // values of a block
constexpr int64_t TILE = BLOCK / 2;    // values of a tile: half a block
constexpr int64_t CHUNK = 12;          // blocks of depth of a strip: they stay in the first cache
constexpr int64_t WIDE = 12;           // panels of that depth: they stay in the second

inline int64_t blocks(int64_t size) { return (size + EDGE - 1) / EDGE; }

inline __m512 widen(const bf16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void narrow(bf16* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline void narrow(bf16* to, __m512 values) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values));
}

// As `narrow`, past the caches: for what is read much later. `to` is a multiple of 64 bytes.
inline void stream(bf16* to, __m512 low, __m512 high) {
  _mm512_stream_si512((__m512i*)to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// e^x with a relative error of 2e-7 for x near 0, 1e-5 at +-100; 0 below -110.
inline __m512 exponential(__m512 x) {
  const __m512 power = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-160));
  const __m512 f = _mm512_reduce_ps(power, 1);  // power - floor(power)
  __m512 p = _mm512_set1_ps(1.8775767e-3f);
  for (const float c : {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, power);
}

// 1 / (1 + e^-x) with a relative error of 2^-14, a thirtieth of bf16's.
inline __m512 sigmoid(__m512 x) {
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), e));
}

// The tiles of this thread while it lives: eight of 16 rows x 64 bytes; then what was there before.
class TileConfig {
 public:
  TileConfig() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~TileConfig() { before_[0] ? _tile_loadconfig(before_) : _tile_release(); }

 private:
  alignas(64) uint8_t before_[64];
};

// c (32 x 32, `stride` floats between rows) = or += one strip x one panel, `depth` blocks deep.
inline void multiply(
    const bf16* strip, const bf16* panel, float* c, int64_t stride, int64_t depth, bool adds) {
  asm volatile("" ::: "memory");  // the tile intrinsics do not tell the compiler what they read
  const int64_t bytes = stride * 4;
  float* lower = c + 16 * stride;
  if (adds) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k, strip += BLOCK, panel += BLOCK) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(4, strip, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, strip + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, panel + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

// Products of `count` strips with `columns` blocks of panels into c: one matrix of 32 rows a strip.
// A chunk of a strip stays in the first cache, WIDE panels of the same depth in the second.
inline void multiply_strips(
    const bf16* strips, int64_t count, const bf16* panels, int64_t columns, int64_t depth, float* c,
    int64_t stride) {
  for (int64_t start = 0; start < depth; start += CHUNK)
    for (int64_t first = 0; first < columns; first += WIDE)
      for (int64_t s = 0; s < count; ++s)
        for (int64_t n = first; n < std::min(first + WIDE, columns); ++n)
          multiply(
              strips + (s * depth + start) * BLOCK, panels + (n * depth + start) * BLOCK,
              c + s * EDGE * stride + n * EDGE, stride, std::min(CHUNK, depth - start), start > 0);
}

// 16 x 16 values of 32 bits, transposed.
inline void transpose_tile(const void* from, void* to, int64_t to_stride = 16, int64_t from_stride = 16) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512((const int32_t*)from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512((int32_t*)to + i * to_stride, a[i]);
}

// A block's rows in pairs: the panel block of the matrix whose depth runs along the block's rows.
inline void interleave(const bf16* block, bf16* to) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  for (int64_t pair = 0; pair < 16; ++pair) {
    const __m512i even = _mm512_loadu_si512(block + 2 * pair * EDGE);
    const __m512i odd = _mm512_loadu_si512(block + (2 * pair + 1) * EDGE);
    _mm512_storeu_si512(to + pair * EDGE, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_storeu_si512(to + TILE + pair * EDGE, _mm512_permutex2var_epi16(even, second, odd));
  }
}

// The panel block of the matrix whose depth runs along the block's columns.
inline void columns_to_panel(const bf16* block, bf16* to) {
  transpose_tile(block, to);
  transpose_tile(block + TILE, to + TILE);
}

// The block itself, transposed.
inline void transpose_block(const bf16* block, bf16* to) {
  alignas(64) bf16 pairs[BLOCK];
  interleave(block, pairs);
  columns_to_panel(pairs, to);
}

// Work for `count` items shared among threads in fixed contiguous parts: (thread, begin, end).
template <class Body>
void parallel(int64_t count, int64_t threads, const Body& body) {
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    TileConfig config;
    body(thread, count * thread / team, count * (thread + 1) / team);
  }
}

// Hands out aligned parts of a workspace; with a null workspace it only measures it.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* here = base_ + used_;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64 + 64;
    return (T*)here;
  }
  int64_t used() const { return used_ + 64; }

 private:
  char* base_;
  int64_t used_ = 0;
};

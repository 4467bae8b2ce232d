// What a block does to each token besides matrix products: modulated RMSNorm and gated residual.
#pragma once
#include "tiles.h"

// One half of a block: its input, its modulation (tables of (levels, width), each token's row of
// them), and the 1 / rms of each token.
struct Half {
  const bf16* x;
  const float *factor, *shift, *gate;
  const int32_t* rows;
  float* scales;
  int64_t width;
  float eps;
};

// Gradients of the three tables: one copy for each thread, added in the order of the threads.
struct TableGradients {
  float *factor, *shift, *gate;
  int64_t size;

  TableGradients(Arena& arena, int64_t levels, int64_t width, int64_t threads)
      : factor(arena.take<float>(3 * levels * width * threads)), size(levels * width) {
    shift = factor + size, gate = shift + size;
  }
  TableGradients of(int64_t thread) const {
    TableGradients own = *this;
    for (float** table : {&own.factor, &own.shift, &own.gate}) *table += 3 * size * thread;
    return own;
  }
  void clear() { memset(factor, 0, 3 * size * sizeof(float)); }
  void sum(float* to, int64_t threads) const {
    memcpy(to, factor, 3 * size * sizeof(float));
    for (int64_t t = 1; t < threads; ++t)
      for (int64_t i = 0; i < 3 * size; ++i) to[i] += factor[3 * size * t + i];
  }
};

// Row `r` of a strip: x / rms(x) x factor + shift of a token; 0 where there is none.
inline void normalise(const Half& h, int64_t token, bool exists, bool is_known, bf16* strip, int64_t r) {
  bf16* to = strip + r * EDGE;
  if (!exists) {
    for (int64_t k = 0; k < h.width; k += EDGE) _mm512_storeu_si512(to + k * EDGE, _mm512_setzero_si512());
    return;
  }
  const bf16* x = h.x + token * h.width;
  if (!is_known) {
    __m512 sum = _mm512_setzero_ps(), other = sum;
    for (int64_t k = 0; k < h.width; k += EDGE) {
      const __m512 low = widen(x + k), high = widen(x + k + 16);
      sum = _mm512_fmadd_ps(low, low, sum);
      other = _mm512_fmadd_ps(high, high, other);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum, other)) / h.width;
    h.scales[token] = 1.0f / __builtin_sqrtf(mean + h.eps);
  }
  const __m512 scale = _mm512_set1_ps(h.scales[token]);
  const float* factor = h.factor + h.rows[token] * h.width;
  const float* shift = h.shift + h.rows[token] * h.width;
  const auto value = [&](int64_t k) {
    const __m512 normed = _mm512_mul_ps(widen(x + k), scale);
    return _mm512_fmadd_ps(normed, _mm512_loadu_ps(factor + k), _mm512_loadu_ps(shift + k));
  };
  for (int64_t k = 0; k < h.width; k += EDGE) narrow(to + k * EDGE, value(k), value(k + 16));
}

// Backward of `normalise`: dx = scale (g' - n mean(g' n)) + residual, n = x scale, g' = g factor.
inline void normalise_backward(
    const Half& h, int64_t token, const float* g, const bf16* residual, const TableGradients& own,
    bf16* dx) {
  const int64_t at = token * h.width, row = h.rows[token] * h.width;
  const float* factor = h.factor + row;
  float *to_factor = own.factor + row, *to_shift = own.shift + row;
  const __m512 scale = _mm512_set1_ps(h.scales[token]);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < h.width; k += 16) {
    const __m512 gk = _mm512_loadu_ps(g + k);
    const __m512 product = _mm512_mul_ps(gk, _mm512_mul_ps(widen(h.x + at + k), scale));
    sum = _mm512_fmadd_ps(product, _mm512_loadu_ps(factor + k), sum);
    _mm512_storeu_ps(to_factor + k, _mm512_add_ps(_mm512_loadu_ps(to_factor + k), product));
    _mm512_storeu_ps(to_shift + k, _mm512_add_ps(_mm512_loadu_ps(to_shift + k), gk));
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / h.width);
  const auto value = [&](int64_t k) {
    const __m512 normed = _mm512_mul_ps(widen(h.x + at + k), scale);
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(g + k), _mm512_loadu_ps(factor + k));
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(normed, mean, v), scale, widen(residual + at + k));
  };
  for (int64_t k = 0; k < h.width; k += EDGE) narrow(dx + at + k, value(k), value(k + 16));
}

// out = x + c x gate of some columns of a token; c is kept as its update if there is a place for it.
inline void add_gated(
    const Half& h, int64_t token, const float* c, bf16* update, bf16* out, int64_t first, int64_t count) {
  const int64_t at = token * h.width + first;
  const float* gate = h.gate + h.rows[token] * h.width + first;
  for (int64_t k = 0; k < count; k += EDGE) {
    const __m512 low = _mm512_loadu_ps(c + k), high = _mm512_loadu_ps(c + k + 16);
    if (update != nullptr) stream(update + at + k, low, high);
    narrow(
        out + at + k, _mm512_fmadd_ps(low, _mm512_loadu_ps(gate + k), widen(h.x + at + k)),
        _mm512_fmadd_ps(high, _mm512_loadu_ps(gate + k + 16), widen(h.x + at + k + 16)));
  }
}

// Backward of `add_gated`: row `r` of a strip is the gradient of the update; also the gate's.
inline void add_gated_backward(
    const Half& h, int64_t token, bool exists, const bf16* grad, const bf16* update,
    const TableGradients& own, bf16* strip, int64_t r) {
  bf16* to = strip + r * EDGE;
  if (!exists) {
    for (int64_t k = 0; k < h.width; k += EDGE) _mm512_storeu_si512(to + k * EDGE, _mm512_setzero_si512());
    return;
  }
  const int64_t at = token * h.width;
  const float* gate = h.gate + h.rows[token] * h.width;
  float* to_gate = own.gate + h.rows[token] * h.width;
  const auto value = [&](int64_t k) {
    const __m512 g = widen(grad + at + k), before = _mm512_loadu_ps(to_gate + k);
    _mm512_storeu_ps(to_gate + k, _mm512_fmadd_ps(g, widen(update + at + k), before));
    return _mm512_mul_ps(g, _mm512_loadu_ps(gate + k));
  };
  for (int64_t k = 0; k < h.width; k += EDGE) narrow(to + k * EDGE, value(k), value(k + 16));
}

// A weight's gradient, summed over tokens: left^T right with the tokens as depth. `left` becomes
// transposed blocks [columns / 32][tokens / 32], `right` panels of the same form.
struct WeightGradient {
  bf16 *left, *right;
  float* sums;
  int64_t left_blocks, right_blocks, capacity;

  WeightGradient(Arena& arena, int64_t left_width, int64_t right_width, int64_t token_blocks)
      : left_blocks(left_width / EDGE), right_blocks(right_width / EDGE), capacity(token_blocks) {
    left = arena.take<bf16>(left_width * token_blocks * EDGE);
    right = arena.take<bf16>(right_width * token_blocks * EDGE);
    sums = arena.take<float>(left_width * right_width);
  }
  void put_left(int64_t column_block, int64_t token_block, const bf16* block) const {
    transpose_block(block, left + (column_block * capacity + token_block) * BLOCK);
  }
  void put_right(int64_t column_block, int64_t token_block, const bf16* block) const {
    interleave(block, right + (column_block * capacity + token_block) * BLOCK);
  }

  // Adds `count` token blocks to the sums of the columns [begin, end) of `right`, in blocks.
  void accumulate(int64_t count, bool is_first, int64_t begin, int64_t end) const {
    for (int64_t first = begin; first < end; first += WIDE)
      for (int64_t start = 0; start < count; start += CHUNK)
        for (int64_t m = 0; m < left_blocks; ++m)
          for (int64_t n = first; n < std::min(first + WIDE, end); ++n)
            multiply(
                left + (m * capacity + start) * BLOCK, right + (n * capacity + start) * BLOCK,
                sums + (m * right_blocks + n) * BLOCK, EDGE, std::min(CHUNK, count - start),
                !is_first || start > 0);
  }

  // Writes the sums of the same columns: (left, right), or (right, left) when transposed.
  void write(float* to, bool is_transposed, int64_t begin, int64_t end) const {
    const int64_t width = (is_transposed ? left_blocks : right_blocks) * EDGE;
    for (int64_t m = 0; m < left_blocks; ++m)
      for (int64_t n = begin; n < end; ++n) {
        const float* block = sums + (m * right_blocks + n) * BLOCK;
        if (!is_transposed) {
          for (int64_t r = 0; r < EDGE; ++r)
            memcpy(to + (m * EDGE + r) * width + n * EDGE, block + r * EDGE, EDGE * 4);
          continue;
        }
        float* corner = to + n * EDGE * width + m * EDGE;
        for (int64_t i = 0; i < 2; ++i)
          for (int64_t j = 0; j < 2; ++j)
            transpose_tile(
                block + i * 16 * EDGE + j * 16, corner + j * 16 * width + i * 16, width, EDGE);
      }
  }
};

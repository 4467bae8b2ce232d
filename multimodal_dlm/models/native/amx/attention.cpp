// out = x + gate[level] x to_out(attention(to_qkv(norm(x) factor[level] + shift[level]))), with
// rotary positions: softmax(rotary(q) rotary(k)^T / sqrt(dim) + bias) v. One thread does one row of
// the batch at a time, or some of its heads; scores never leave the cache. Without a place for the
// update nothing is kept for backward: the other places may be null.
#include "rows.h"

#include <new>

namespace {

struct Sizes {
  int64_t length, width, heads, dim;
  int64_t strips() const { return blocks(length); }
  int64_t w() const { return width / EDGE; }
  int64_t d() const { return dim / EDGE; }
  int64_t inner() const { return heads * d(); }  // blocks of all heads side by side
  float scale() const { return 1.0f / __builtin_sqrtf(float(dim)); }
};

// The strip of one head: [row of the batch][head][q, k, v][strip][dim / 32].
inline bf16* head_at(const bf16* saved, const Sizes& z, int64_t b, int64_t head, int64_t part, int64_t s) {
  return (bf16*)saved + ((((b * z.heads + head) * 3 + part) * z.strips() + s) * z.d()) * BLOCK;
}

// Turns each row of (32, dim) by its angles (`direction` -1: back) and narrows it into a strip.
inline void rotate(
    const float* c, const bf16* cos, const bf16* sin, int64_t count, int64_t dim, float direction,
    bf16* strip) {
  const int64_t half = dim / 2;
  const __m512 sign = _mm512_set1_ps(direction);
  for (int64_t r = 0; r < EDGE; ++r)
    for (int64_t i = 0; i < half; i += 16) {
      __m512 first = _mm512_loadu_ps(c + r * dim + i), second = _mm512_loadu_ps(c + r * dim + half + i);
      if (cos != nullptr && r < count) {
        const __m512 cosine = widen(cos + r * dim + i);
        const __m512 sine = _mm512_mul_ps(widen(sin + r * dim + half + i), sign);
        const __m512 turned = _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine));
        second = _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine));
        first = turned;
      }
      const int64_t j = half + i;
      narrow(strip + i / EDGE * BLOCK + r * EDGE + i % EDGE, first);
      narrow(strip + j / EDGE * BLOCK + r * EDGE + j % EDGE, second);
    }
}

// Scores of 16 keys of one query, scaled and biased; keys past the end are -inf.
inline __m512 score(const float* c, const bf16* bias, int64_t key, int64_t length, __m512 scale) {
  const __mmask16 inside = key + 16 <= length ? 0xffff : (key < length ? (1 << (length - key)) - 1 : 0);
  __m512 value = _mm512_mul_ps(_mm512_loadu_ps(c), scale);
  if (bias != nullptr) {
    const __m256i raw = _mm256_maskz_loadu_epi16(inside, bias + key);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
    value = _mm512_add_ps(value, _mm512_castsi512_ps(wide));
  }
  return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), inside, value);
}

// Softmax of 32 queries' scores (32, keys) into a strip; returns log(sum(exp)) of each row.
inline void softmax(
    float* c, const bf16* bias, int64_t count, int64_t length, int64_t keys, float scaling,
    bf16* strip, float* logsumexp) {
  const __m512 scale = _mm512_set1_ps(scaling);
  for (int64_t r = 0; r < EDGE; ++r) {
    float* row = c + r * keys;
    const bf16* row_bias = bias != nullptr && r < count ? bias + r * length : nullptr;
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < keys; k += 16) {
      const __m512 value = score(row + k, row_bias, k, length, scale);
      top = _mm512_max_ps(top, value);
      _mm512_storeu_ps(row + k, value);
    }
    const float most = _mm512_reduce_max_ps(top);
    for (int64_t k = 0; k < keys; k += 16) {
      const __m512 value =
          exponential(_mm512_sub_ps(_mm512_loadu_ps(row + k), _mm512_set1_ps(most)));
      sum = _mm512_add_ps(sum, value);
      _mm512_storeu_ps(row + k, value);
    }
    const float total = _mm512_reduce_add_ps(sum);
    const __m512 share = _mm512_set1_ps(1.0f / total);
    logsumexp[r] = most + __builtin_logf(total);
    for (int64_t k = 0; k < keys; k += EDGE)
      narrow(
          strip + k * EDGE + r * EDGE, _mm512_mul_ps(_mm512_loadu_ps(row + k), share),
          _mm512_mul_ps(_mm512_loadu_ps(row + k + 16), share));
  }
}

// (32, columns) float32 into a strip.
inline void narrow_strip(const float* c, int64_t columns, bf16* strip) {
  for (int64_t r = 0; r < EDGE; ++r)
    for (int64_t k = 0; k < columns; k += EDGE)
      narrow(
          strip + k * EDGE + r * EDGE, _mm512_loadu_ps(c + r * columns + k),
          _mm512_loadu_ps(c + r * columns + k + 16));
}

// Strips (count, depth blocks) as panels whose depth runs along the rows: [depth][count].
inline void rows_to_panels(const bf16* strips, int64_t count, int64_t depth, bf16* panels) {
  for (int64_t s = 0; s < count; ++s)
    for (int64_t k = 0; k < depth; ++k)
      interleave(strips + (s * depth + k) * BLOCK, panels + (k * count + s) * BLOCK);
}

// Strips as panels whose depth runs along the columns: [count][depth].
inline void columns_to_panels(const bf16* strips, int64_t count, int64_t depth, bf16* panels) {
  for (int64_t i = 0; i < count * depth; ++i) columns_to_panel(strips + i * BLOCK, panels + i * BLOCK);
}

// Buffers of one head's backward.
struct HeadBuffers {
  bf16 *keys_panel, *values_panel, *query_rows, *key_rows, *grad_rows, *scores, *probabilities_t,
      *scores_t, *block;
  float *c, *d;

  HeadBuffers(Arena& arena, const Sizes& z) {
    const int64_t head = z.strips() * z.d() * BLOCK, square = z.strips() * z.strips() * BLOCK;
    for (bf16** part : {&keys_panel, &values_panel, &query_rows, &key_rows, &grad_rows})
      *part = arena.take<bf16>(head);
    scores = arena.take<bf16>(square), probabilities_t = arena.take<bf16>(square);
    scores_t = arena.take<bf16>(square), block = arena.take<bf16>(BLOCK);
    c = arena.take<float>(EDGE * z.dim + BLOCK), d = arena.take<float>(BLOCK);
  }
};

// P of one block of queries and keys, and dS = P (dP - delta) / sqrt(dim).
inline void softmax_backward(
    const float* c, const float* d, const bf16* bias, const float* logsumexp, const float* delta,
    int64_t count, int64_t key, int64_t length, float scaling, bf16* probabilities, bf16* scores) {
  const __m512 scale = _mm512_set1_ps(scaling);
  for (int64_t r = 0; r < EDGE; ++r) {
    const bf16* row_bias = bias != nullptr && r < count ? bias + r * length : nullptr;
    __m512 p[2], s[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = r * EDGE + 16 * half;
      const __m512 value = score(c + at, row_bias, key + 16 * half, length, scale);
      p[half] = exponential(_mm512_sub_ps(value, _mm512_set1_ps(logsumexp[r])));
      const __m512 inner = _mm512_sub_ps(_mm512_loadu_ps(d + at), _mm512_set1_ps(delta[r]));
      s[half] = _mm512_mul_ps(_mm512_mul_ps(p[half], inner), scale);
    }
    narrow(probabilities + r * EDGE, p[0], p[1]);
    narrow(scores + r * EDGE, s[0], s[1]);
  }
}

// Gradients of one head of one row of the batch, turned back, into the strips of dqkv.
void head_backward(
    const Sizes& z, const bf16* q, const bf16* k, const bf16* v, const bf16* grad, const bf16* bias,
    const bf16* cos, const bf16* sin, const float* logsumexp, const float* delta, int64_t head,
    const HeadBuffers& own, bf16* dqkv) {
  const int64_t n = z.strips(), d = z.d(), row = 3 * z.inner() * BLOCK;
  columns_to_panels(k, n, d, own.keys_panel);
  columns_to_panels(v, n, d, own.values_panel);
  rows_to_panels(q, n, d, own.query_rows);
  rows_to_panels(k, n, d, own.key_rows);
  rows_to_panels(grad, n, d, own.grad_rows);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t count = std::min(EDGE, z.length - i * EDGE);
    for (int64_t j = 0; j < n; ++j) {
      multiply(q + i * d * BLOCK, own.keys_panel + j * d * BLOCK, own.c, EDGE, d, false);
      multiply(grad + i * d * BLOCK, own.values_panel + j * d * BLOCK, own.d, EDGE, d, false);
      bf16* scores = own.scores + (i * n + j) * BLOCK;
      softmax_backward(
          own.c, own.d, bias == nullptr ? nullptr : bias + i * EDGE * z.length,
          logsumexp + i * EDGE, delta + i * EDGE, count, j * EDGE, z.length, z.scale(), own.block,
          scores);
      transpose_block(own.block, own.probabilities_t + (j * n + i) * BLOCK);
      transpose_block(scores, own.scores_t + (j * n + i) * BLOCK);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t count = std::min(EDGE, z.length - i * EDGE), token = i * EDGE * z.dim;
    bf16* to = dqkv + i * row + head * d * BLOCK;
    multiply_strips(own.scores + i * n * BLOCK, 1, own.key_rows, d, n, own.c, z.dim);
    rotate(own.c, cos + token, sin + token, count, z.dim, -1, to);
    multiply_strips(own.scores_t + i * n * BLOCK, 1, own.query_rows, d, n, own.c, z.dim);
    rotate(own.c, cos + token, sin + token, count, z.dim, -1, to + z.inner() * BLOCK);
    multiply_strips(own.probabilities_t + i * n * BLOCK, 1, own.grad_rows, d, n, own.c, z.dim);
    narrow_strip(own.c, z.dim, to + 2 * z.inner() * BLOCK);
  }
}

}  // namespace

extern "C" int64_t attention_forward(
    const bf16* x, const float* factor, const float* shift, const float* gate, const int32_t* rows,
    const bf16* in_panels, const bf16* out_panels, const bf16* cos, const bf16* sin,
    const bf16* bias, bf16* out, float* scales, bf16* saved, bf16* attended, float* logsumexp,
    bf16* update, int64_t batch, int64_t length, int64_t width, int64_t heads, int64_t dim,
    float eps, int64_t threads, char* workspace) {
  const Sizes z{length, width, heads, dim};
  const int64_t n = z.strips(), w = z.w(), d = z.d(), inner = z.inner(), keys = n * EDGE;
  struct Local {
    bf16 *normed, *keys_panel, *value_rows, *weights;
    float* c;
  };
  Arena arena(workspace);
  Local locals[256];
  for (int64_t t = 0; t < threads; ++t)
    locals[t] = {
        arena.take<bf16>(n * w * BLOCK), arena.take<bf16>(n * d * BLOCK),
        arena.take<bf16>(n * d * BLOCK), arena.take<bf16>(n * BLOCK),
        arena.take<float>(std::max(n * EDGE * dim, std::max(EDGE * keys, n * EDGE * (width + 16))))};
  const bool is_kept = update != nullptr;  // for backward: each row has a slot of its own
  if (!is_kept) {
    const int64_t slots = std::min(batch, threads);
    saved = arena.take<bf16>(slots * 3 * n * inner * BLOCK);
    attended = arena.take<bf16>(slots * n * inner * BLOCK);
    logsumexp = arena.take<float>(slots * heads * keys);
    scales = arena.take<float>(threads * batch * length);
  }
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, gate, rows, scales, width, eps};
  const int64_t stride = width + 16;

  // The steps of one row of the batch, whose heads are kept at `slot`.
  const auto normalise_row = [&](int64_t thread, int64_t b) {
    Half own = h;
    if (!is_kept) own.scales += thread * batch * length;
    bf16* normed = locals[thread].normed;
    for (int64_t r = 0; r < keys; ++r)
      normalise(own, b * length + r, r < length, false, normed + r / EDGE * w * BLOCK, r % EDGE);
  };
  const auto project = [&](const Local& own, int64_t b, int64_t slot, int64_t part, int64_t head) {
    multiply_strips(
        own.normed, n, in_panels + (part * inner + head * d) * w * BLOCK, d, w, own.c, dim);
    for (int64_t s = 0; s < n; ++s) {
      const int64_t angle = part == 2 ? 0 : (b * length + s * EDGE) * dim;
      rotate(
          own.c + s * EDGE * dim, part == 2 ? nullptr : cos + angle, sin + angle,
          length - s * EDGE, dim, 1, head_at(saved, z, slot, head, part, s));
    }
  };
  const auto attend = [&](const Local& own, int64_t b, int64_t slot, int64_t head) {
    const bf16* row_bias = bias == nullptr ? nullptr : bias + b * length * length;
    columns_to_panels(head_at(saved, z, slot, head, 1, 0), n, d, own.keys_panel);
    rows_to_panels(head_at(saved, z, slot, head, 2, 0), n, d, own.value_rows);
    for (int64_t s = 0; s < n; ++s) {
      multiply_strips(head_at(saved, z, slot, head, 0, s), 1, own.keys_panel, n, d, own.c, keys);
      softmax(
          own.c, row_bias == nullptr ? nullptr : row_bias + s * EDGE * length, length - s * EDGE,
          length, keys, z.scale(), own.weights,
          logsumexp + (slot * heads + head) * keys + s * EDGE);
      multiply_strips(own.weights, 1, own.value_rows, d, n, own.c, dim);
      narrow_strip(own.c, dim, attended + ((slot * n + s) * inner + head * d) * BLOCK);
    }
  };
  if (is_kept || batch >= threads) {
    parallel(batch, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      const Local& own = locals[thread];
      for (int64_t b = begin; b < end; ++b) {
        const int64_t slot = is_kept ? b : thread;
        normalise_row(thread, b);
        for (int64_t i = 0; i < 3 * heads; ++i) project(own, b, slot, i / heads, i % heads);
        for (int64_t head = 0; head < heads; ++head) attend(own, b, slot, head);
        multiply_strips(attended + slot * n * inner * BLOCK, n, out_panels, w, inner, own.c, stride);
        for (int64_t r = 0; r < length; ++r)
          add_gated(h, b * length + r, own.c + r * stride, update, out, 0, width);
      }
    });
    return 0;
  }
  // Fewer rows than threads: these share the heads, then the columns, of each row.
  parallel(batch * 3 * heads, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t i = begin, known = -1; i < end; ++i) {
      const int64_t b = i / (3 * heads), rest = i % (3 * heads);
      if (b != known) normalise_row(thread, known = b);
      project(locals[thread], b, b, rest / heads, rest % heads);
    }
  });
  parallel(batch * heads, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attend(locals[thread], i / heads, i / heads, i % heads);
  });
  parallel(w * batch * n, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    float* c = locals[thread].c;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / (batch * n), strip = i % (batch * n), from = strip % n * EDGE;
      multiply(
          attended + strip * inner * BLOCK, out_panels + column * inner * BLOCK, c, EDGE, inner, false);
      for (int64_t r = 0; r < std::min(EDGE, length - from); ++r)
        add_gated(
            h, strip / n * length + from + r, c + r * EDGE, nullptr, out, column * EDGE, EDGE);
    }
  });
  return 0;
}

extern "C" int64_t attention_backward(
    const bf16* grad, const bf16* x, const float* factor, const float* shift, const float* gate,
    const int32_t* rows, const bf16* in_panels, const bf16* out_panels, const bf16* cos,
    const bf16* sin, const bf16* bias, const float* scales, const bf16* saved, const bf16* attended,
    const float* logsumexp, const bf16* update, bf16* dx, float* tables, float* d_in, float* d_out,
    int64_t batch, int64_t length, int64_t levels, int64_t width, int64_t heads, int64_t dim,
    int64_t threads, char* workspace) {
  const Sizes z{length, width, heads, dim};
  const int64_t n = z.strips(), w = z.w(), d = z.d(), inner = z.inner(), keys = n * EDGE;
  const int64_t stride = width + 16;
  struct Local {
    bf16 *outer, *grad_heads, *dqkv, *normed;
    float *c, *delta;
    HeadBuffers head;
  };
  Arena arena(workspace);
  alignas(Local) char storage[256 * sizeof(Local)];
  Local* locals = (Local*)storage;
  for (int64_t t = 0; t < threads; ++t)
    new (locals + t) Local{
        arena.take<bf16>(n * w * BLOCK),
        arena.take<bf16>(n * inner * BLOCK),
        arena.take<bf16>(n * 3 * inner * BLOCK),
        arena.take<bf16>(w * BLOCK),
        arena.take<float>(n * EDGE * std::max(stride, dim)),
        arena.take<float>(keys),
        HeadBuffers(arena, z)};
  // Rows of the batch whose operands of the weight gradients are kept: as many for each thread.
  const int64_t group = std::min(batch, threads * std::max<int64_t>(1, 16 / n));
  const TableGradients sums(arena, levels, width, threads);
  const WeightGradient to_out(arena, width, inner * EDGE, group * n);
  const WeightGradient to_qkv(arena, width, 3 * inner * EDGE, group * n);
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, gate, rows, (float*)scales, width, 0};
  for (int64_t t = 0; t < threads; ++t) sums.of(t).clear();

  // One row of the batch; its operands of the weight gradients go to token blocks from `place`.
  const auto one_row = [&](int64_t b, int64_t place, const Local& own, const TableGradients& grads) {
    for (int64_t s = 0; s < n; ++s) {
      bf16* strip = own.outer + s * w * BLOCK;
      for (int64_t r = 0, i = s * EDGE; r < EDGE; ++r, ++i)
        add_gated_backward(h, b * length + i, i < length, grad, update, grads, strip, r);
      for (int64_t k = 0; k < w; ++k) to_out.put_left(k, place + s, strip + k * BLOCK);
      for (int64_t k = 0; k < inner; ++k)
        to_out.put_right(k, place + s, attended + ((b * n + s) * inner + k) * BLOCK);
    }
    for (int64_t head = 0; head < heads; ++head) {
      multiply_strips(own.outer, n, out_panels + head * d * w * BLOCK, d, w, own.c, dim);
      for (int64_t s = 0; s < n; ++s) {
        const float* c = own.c + s * EDGE * dim;
        const bf16* o = attended + ((b * n + s) * inner + head * d) * BLOCK;
        narrow_strip(c, dim, own.grad_heads + s * d * BLOCK);
        for (int64_t r = 0; r < EDGE; ++r) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t i = 0; i < dim; i += 16)
            sum = _mm512_fmadd_ps(
                _mm512_loadu_ps(c + r * dim + i),
                widen(o + i / EDGE * BLOCK + r * EDGE + i % EDGE), sum);
          own.delta[s * EDGE + r] = _mm512_reduce_add_ps(sum);
        }
      }
      head_backward(
          z, head_at(saved, z, b, head, 0, 0), head_at(saved, z, b, head, 1, 0),
          head_at(saved, z, b, head, 2, 0), own.grad_heads,
          bias == nullptr ? nullptr : bias + b * length * length, cos + b * length * dim,
          sin + b * length * dim, logsumexp + (b * heads + head) * keys, own.delta, head, own.head,
          own.dqkv);
    }
    multiply_strips(own.dqkv, n, in_panels, w, 3 * inner, own.c, stride);
    for (int64_t s = 0; s < n; ++s) {
      for (int64_t r = 0, i = s * EDGE; r < EDGE; ++r, ++i) {
        normalise(h, b * length + i, i < length, true, own.normed, r);
        if (i < length) normalise_backward(h, b * length + i, own.c + i * stride, grad, grads, dx);
      }
      for (int64_t k = 0; k < w; ++k) to_qkv.put_left(k, place + s, own.normed + k * BLOCK);
      for (int64_t k = 0; k < 3 * inner; ++k)
        to_qkv.put_right(k, place + s, own.dqkv + (s * 3 * inner + k) * BLOCK);
    }
  };

  for (int64_t base = 0; base < batch; base += group) {
    const int64_t last = std::min(base + group, batch);
    const bool is_first = base == 0, is_last = last == batch;
    parallel(last - base, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        one_row(base + b, b * n, locals[thread], sums.of(thread));
    });
    parallel(inner, threads, [&](int64_t, int64_t begin, int64_t end) {
      to_out.accumulate((last - base) * n, is_first, begin, end);
      to_qkv.accumulate((last - base) * n, is_first, 3 * begin, 3 * end);
      if (is_last) to_out.write(d_out, false, begin, end);
      if (is_last) to_qkv.write(d_in, true, 3 * begin, 3 * end);
    });
  }
  sums.sum(tables, threads);
  return 0;
}

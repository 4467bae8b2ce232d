// out = x + gate[level] x down(silu(g) x u), (g, u) = halves of in(norm(x) factor[level] + shift[level]).
// Without a place for (g, u) nothing is kept for backward: the other places may be null.
#include <utility>

#include "rows.h"

namespace {

constexpr int64_t STRIPS = 8;  // strips of a thread that share the panels in its second cache
constexpr int64_t FEW = 4;  // with fewer strips for each thread, threads share the columns instead
constexpr int64_t KEPT = 16;  // token blocks for each thread that the weight gradients take at once

// Column block and strip of product `i`: WIDE columns of one strip after another.
inline std::pair<int64_t, int64_t> place_of(int64_t i, int64_t columns, int64_t count) {
  const int64_t first = i / (WIDE * count) * WIDE, wide = std::min(WIDE, columns - first);
  const int64_t rest = i - first * count;
  return {first + rest % wide, rest / wide};
}

// Row `r` of a block of silu(g) u; keeps (g, u) if there is a place for them.
inline void swiglu(const float* gate, const float* up, bf16* saved, bf16* active, int64_t r) {
  const int64_t i = r * EDGE;
  const auto value = [&](int64_t k) {
    const __m512 g = _mm512_loadu_ps(gate + k);
    return _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), _mm512_loadu_ps(up + k));
  };
  if (saved != nullptr) {
    stream(saved + i, _mm512_loadu_ps(gate + i), _mm512_loadu_ps(gate + i + 16));
    stream(saved + BLOCK + i, _mm512_loadu_ps(up + i), _mm512_loadu_ps(up + i + 16));
  }
  narrow(active + i, value(i), value(i + 16));
}

// Row `r` of a block's silu(g) u and of the gradients of g and u.
inline void swiglu_backward(
    const float* grad, const bf16* saved, bf16* active, bf16* grad_gate, bf16* grad_up, int64_t r) {
  __m512 a[2], dg[2], du[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t k = r * EDGE + 16 * half;
    const __m512 g = widen(saved + k), u = widen(saved + BLOCK + k), d = _mm512_loadu_ps(grad + k);
    const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s);
    a[half] = _mm512_mul_ps(silu, u);
    du[half] = _mm512_mul_ps(d, silu);
    // silu'(g) = s + silu - silu s
    const __m512 slope = _mm512_fnmadd_ps(silu, s, _mm512_add_ps(s, silu));
    dg[half] = _mm512_mul_ps(_mm512_mul_ps(d, u), slope);
  }
  narrow(active + r * EDGE, a[0], a[1]);
  narrow(grad_gate + r * EDGE, dg[0], dg[1]);
  narrow(grad_up + r * EDGE, du[0], du[1]);
}

}  // namespace

extern "C" int64_t mlp_forward(
    const bf16* x, const float* factor, const float* shift, const float* gate, const int32_t* rows,
    const bf16* in_panels, const bf16* out_panels, bf16* out, float* scales, bf16* saved,
    bf16* update, int64_t tokens, int64_t width, int64_t inner, float eps, int64_t threads,
    char* workspace) {
  const int64_t w = width / EDGE, f = inner / EDGE, stride = width + 16;
  struct Local {
    bf16 *normed, *active;
    float *gate, *up, *c;
  };
  Arena arena(workspace);
  Local locals[256];
  for (int64_t t = 0; t < threads; ++t)
    locals[t] = {
        arena.take<bf16>(STRIPS * w * BLOCK), arena.take<bf16>(STRIPS * f * BLOCK),
        arena.take<float>(BLOCK), arena.take<float>(BLOCK),
        arena.take<float>(STRIPS * EDGE * stride)};
  const int64_t strips = blocks(tokens);
  const bool is_shared = saved == nullptr && strips < FEW * threads;
  bf16* normed = arena.take<bf16>(is_shared ? strips * w * BLOCK : 0);
  bf16* active = arena.take<bf16>(is_shared ? strips * f * BLOCK : 0);
  if (saved == nullptr) scales = arena.take<float>(tokens);
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, gate, rows, scales, width, eps};
  if (is_shared) {
    parallel(tokens, threads, [&](int64_t, int64_t begin, int64_t end) {
      const int64_t last = end == tokens ? strips * EDGE : end;
      for (int64_t t = begin; t < last; ++t)
        normalise(h, t, t < tokens, false, normed + t / EDGE * w * BLOCK, t % EDGE);
    });
    parallel(f * strips, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      const Local& own = locals[thread];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i / strips, s = i % strips;
        multiply(normed + s * w * BLOCK, in_panels + j * w * BLOCK, own.gate, EDGE, w, false);
        multiply(normed + s * w * BLOCK, in_panels + (f + j) * w * BLOCK, own.up, EDGE, w, false);
        for (int64_t r = 0; r < EDGE; ++r)
          swiglu(own.gate, own.up, nullptr, active + (s * f + j) * BLOCK, r);
      }
    });
    parallel(w * strips, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      float* c = locals[thread].c;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / strips, s = i % strips;
        multiply(active + s * f * BLOCK, out_panels + n * f * BLOCK, c, EDGE, f, false);
        for (int64_t r = 0; r < std::min(EDGE, tokens - s * EDGE); ++r)
          add_gated(h, s * EDGE + r, c + r * EDGE, nullptr, out, n * EDGE, EDGE);
      }
    });
    return 0;
  }
  parallel((strips + STRIPS - 1) / STRIPS, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const Local& own = locals[thread];
    for (int64_t first = begin * STRIPS; first < std::min(end * STRIPS, strips); first += STRIPS) {
      const int64_t count = std::min(STRIPS, strips - first), from = first * EDGE;
      for (int64_t r = 0; r < count * EDGE; ++r)
        normalise(
            h, from + r, from + r < tokens, false, own.normed + r / EDGE * w * BLOCK, r % EDGE);
      for (int64_t i = 0; i < f * count; ++i) {
        const auto [j, s] = place_of(i, f, count);
        const bf16* strip = own.normed + s * w * BLOCK;
        multiply(strip, in_panels + j * w * BLOCK, own.gate, EDGE, w, false);
        multiply(strip, in_panels + (f + j) * w * BLOCK, own.up, EDGE, w, false);
        bf16* keep = saved == nullptr ? nullptr : saved + ((first + s) * f + j) * 2 * BLOCK;
        for (int64_t r = 0; r < EDGE; ++r)
          swiglu(own.gate, own.up, keep, own.active + (s * f + j) * BLOCK, r);
      }
      multiply_strips(own.active, count, out_panels, w, f, own.c, stride);
      for (int64_t r = 0; r < std::min(count * EDGE, tokens - from); ++r)
        add_gated(h, from + r, own.c + r * stride, update, out, 0, width);
    }
  });
  return 0;
}

extern "C" int64_t mlp_backward(
    const bf16* grad, const bf16* x, const float* factor, const float* shift, const float* gate,
    const int32_t* rows, const bf16* in_panels, const bf16* out_panels, const float* scales,
    const bf16* saved, const bf16* update, bf16* dx, float* tables, float* d_in, float* d_out,
    int64_t tokens, int64_t levels, int64_t width, int64_t inner, int64_t threads, char* workspace) {
  const int64_t w = width / EDGE, f = inner / EDGE, stride = width + 16;
  struct Local {
    bf16 *outer, *inner, *active, *normed;
    float *product, *dh;
  };
  Arena arena(workspace);
  Local locals[256];
  for (int64_t t = 0; t < threads; ++t)
    locals[t] = {
        arena.take<bf16>(STRIPS * w * BLOCK), arena.take<bf16>(STRIPS * 2 * f * BLOCK),
        arena.take<bf16>(BLOCK),              arena.take<bf16>(w * BLOCK),
        arena.take<float>(BLOCK),             arena.take<float>(STRIPS * EDGE * stride)};
  const int64_t strips = blocks(tokens), kept = std::min(KEPT * threads, strips);
  const TableGradients sums(arena, levels, width, threads);
  const WeightGradient down(arena, width, inner, kept), up(arena, width, 2 * inner, kept);
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, gate, rows, (float*)scales, width, 0};
  for (int64_t t = 0; t < threads; ++t) sums.of(t).clear();

  for (int64_t base = 0; base < strips; base += kept) {
    const int64_t last = std::min(base + kept, strips);
    parallel((last - base + STRIPS - 1) / STRIPS, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      const Local& own = locals[thread];
      const TableGradients grads = sums.of(thread);
      for (int64_t place = begin * STRIPS; place < std::min(end * STRIPS, last - base); place += STRIPS) {
        const int64_t count = std::min(STRIPS, last - base - place), from = (base + place) * EDGE;
        for (int64_t s = 0; s < count; ++s) {
          bf16* strip = own.outer + s * w * BLOCK;
          for (int64_t r = 0, token = from + s * EDGE; r < EDGE; ++r, ++token)
            add_gated_backward(h, token, token < tokens, grad, update, grads, strip, r);
          for (int64_t k = 0; k < w; ++k) down.put_left(k, place + s, strip + k * BLOCK);
        }
        for (int64_t i = 0; i < f * count; ++i) {
          const auto [j, s] = place_of(i, f, count);
          multiply(
              own.outer + s * w * BLOCK, out_panels + j * w * BLOCK, own.product, EDGE, w, false);
          const bf16* kept_here = saved + ((base + place + s) * f + j) * 2 * BLOCK;
          bf16 *dg = own.inner + (s * 2 * f + j) * BLOCK, *du = dg + f * BLOCK;
          for (int64_t r = 0; r < EDGE; ++r)
            swiglu_backward(own.product, kept_here, own.active, dg, du, r);
          down.put_right(j, place + s, own.active);
          up.put_right(j, place + s, dg);
          up.put_right(f + j, place + s, du);
        }
        multiply_strips(own.inner, count, in_panels, w, 2 * f, own.dh, stride);
        for (int64_t s = 0; s < count; ++s) {
          for (int64_t r = 0, token = from + s * EDGE; r < EDGE; ++r, ++token) {
            normalise(h, token, token < tokens, true, own.normed, r);
            if (token < tokens)
              normalise_backward(h, token, own.dh + (s * EDGE + r) * stride, grad, grads, dx);
          }
          for (int64_t k = 0; k < w; ++k) up.put_left(k, place + s, own.normed + k * BLOCK);
        }
      }
    });
    parallel(f, threads, [&](int64_t, int64_t begin, int64_t end) {
      down.accumulate(last - base, base == 0, begin, end);
      up.accumulate(last - base, base == 0, 2 * begin, 2 * end);
      if (last == strips) down.write(d_out, false, begin, end);
      if (last == strips) up.write(d_in, true, 2 * begin, 2 * end);
    });
  }
  sums.sum(tables, threads);
  return 0;
}

// A weight (rows, columns) in bf16 panels: for x W^T (depth along columns) and, unless that place is
// null, for x W (along rows).
template <class Value>
static void pack(const Value* weight, bf16* forward, bf16* backward, int64_t rows, int64_t columns, int64_t threads) {
  const int64_t n_blocks = rows / EDGE, k_blocks = columns / EDGE;
  parallel(n_blocks, threads, [&](int64_t, int64_t begin, int64_t end) {
    alignas(64) bf16 block[BLOCK];
    for (int64_t n = begin; n < end; ++n)
      for (int64_t k = 0; k < k_blocks; ++k) {
        for (int64_t r = 0; r < EDGE; ++r) {
          const Value* from = weight + (n * EDGE + r) * columns + k * EDGE;
          if constexpr (sizeof(Value) == 4)
            narrow(block + r * EDGE, _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
          else
            _mm512_store_si512(block + r * EDGE, _mm512_loadu_si512(from));
        }
        columns_to_panel(block, forward + (n * k_blocks + k) * BLOCK);
        if (backward != nullptr) interleave(block, backward + (k * n_blocks + n) * BLOCK);
      }
  });
}

extern "C" void pack_float(const float* weight, bf16* forward, bf16* backward, int64_t rows, int64_t columns, int64_t threads) {
  pack(weight, forward, backward, rows, columns, threads);
}

extern "C" void pack_bf16(const bf16* weight, bf16* forward, bf16* backward, int64_t rows, int64_t columns, int64_t threads) {
  pack(weight, forward, backward, rows, columns, threads);
}

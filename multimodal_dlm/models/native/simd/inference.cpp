// Float32 halves of a block without gradients, on AVX2 or AVX-512: each activation is read and written
// once.
//
// Weights are panels: [rows / 16][columns][16 rows], read once for every 192 tokens. A token's
// result is a sum in one fixed order, whatever tokens are beside it, however many threads share
// the columns and however wide the registers are: the same token gives the same bits alone and in a
// batch, and with either set of instructions.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t LANES = 8;          // values of a register
constexpr int64_t PANEL = 2 * LANES;  // columns of a product that are summed at once
constexpr int64_t DEPTH = 256;        // rows of a panel that stay in the first cache
constexpr int64_t TOKENS = 192;       // tokens for which a panel is read once
constexpr int64_t SPACE = 16;         // values between rows, which a power of two would let collide

// The sums of a token with a panel.
#ifdef __AVX512F__
constexpr int64_t ROWS = 14;  // tokens that are summed at once, a register each
struct Sums {
  __m512 values;
  void load(const float* c) { values = _mm512_loadu_ps(c); }
  void clear() { values = _mm512_setzero_ps(); }
  void add(const float* a, const Sums& panel) {
    values = _mm512_fmadd_ps(_mm512_set1_ps(*a), panel.values, values);
  }
  void store(float* c) const { _mm512_storeu_ps(c, values); }
};
#else
constexpr int64_t ROWS = 6;  // tokens that are summed at once, two registers each
struct Sums {
  __m256 low, high;
  void load(const float* c) { low = _mm256_loadu_ps(c), high = _mm256_loadu_ps(c + LANES); }
  void clear() { low = high = _mm256_setzero_ps(); }
  void add(const float* a, const Sums& panel) {
    const __m256 value = _mm256_broadcast_ss(a);
    low = _mm256_fmadd_ps(value, panel.low, low);
    high = _mm256_fmadd_ps(value, panel.high, high);
  }
  void store(float* c) const { _mm256_storeu_ps(c, low), _mm256_storeu_ps(c + LANES, high); }
};
#endif

// c (R, 16) = or += R rows of a (`stride` apart) x `depth` rows of a panel.
template <int64_t R>
void multiply(
    const float* a, int64_t stride, const float* panel, int64_t depth, float* c, bool adds) {
  Sums sums[R], row;
#pragma GCC unroll 14
  for (int64_t r = 0; r < R; ++r) adds ? sums[r].load(c + r * PANEL) : sums[r].clear();
  for (int64_t k = 0; k < depth; ++k) {
    row.load(panel + k * PANEL);
#pragma GCC unroll 14
    for (int64_t r = 0; r < R; ++r) sums[r].add(a + r * stride + k, row);
  }
#pragma GCC unroll 14
  for (int64_t r = 0; r < R; ++r) sums[r].store(c + r * PANEL);
}

// multiply<R> for an R known at run time.
template <int64_t R = ROWS, class... Arguments>
inline void multiply_rows(int64_t rows, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1>(rows, arguments...);
  multiply<R>(arguments...);
}

// c (count, 16) = a (count, depth) x one panel, by groups of tokens as equal as can be: a small group
// takes as long as a large one.
inline void product(
    const float* a, int64_t stride, int64_t count, const float* panel, int64_t depth, float* c) {
  const int64_t groups = (count + ROWS - 1) / ROWS;
  for (int64_t start = 0; start < depth; start += DEPTH) {
    const int64_t deep = std::min(DEPTH, depth - start);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = count * group / groups, rows = count * (group + 1) / groups - row;
      multiply_rows(
          rows, a + row * stride + start, stride, panel + start * PANEL, deep, c + row * PANEL,
          start > 0);
    }
  }
}

// e^x with a relative error of 2e-7, for x of -87 to 88 and the nearest of these beyond: x = n log(2)
// + f, e^f by the polynomial of Cephes' expf, 2^n by its exponent.
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  const __m256 n = _mm256_round_ps(
      _mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 f = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  f = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), f);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c));
  p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(f, f), p, f), _mm256_set1_ps(1));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

inline float sum_of(__m256 values) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// One half of a block: its input, and its modulation (tables of (levels, width), each token's row of
// them).
struct Half {
  const float *x, *factor, *shift, *gate;
  const int32_t* rows;
  int64_t width;
  float eps;

  // x / rms(x) x factor + shift of a token.
  void normalise(int64_t token, float* to) const {
    const float *from = x + token * width, *f = factor + rows[token] * width;
    const float* s = shift + rows[token] * width;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t k = 0; k < width; k += LANES) {
      const __m256 value = _mm256_loadu_ps(from + k);
      sum = _mm256_fmadd_ps(value, value, sum);
    }
    const __m256 scale = _mm256_set1_ps(1.0f / __builtin_sqrtf(sum_of(sum) / width + eps));
    for (int64_t k = 0; k < width; k += LANES)
      _mm256_storeu_ps(
          to + k, _mm256_fmadd_ps(
                      _mm256_mul_ps(_mm256_loadu_ps(from + k), scale), _mm256_loadu_ps(f + k),
                      _mm256_loadu_ps(s + k)));
  }

  // x + c x gate of one panel's columns of a token.
  void add_gated(int64_t token, const float* c, int64_t column, float* out) const {
    const int64_t at = token * width + column;
    const float* g = gate + rows[token] * width + column;
    for (int64_t k = 0; k < PANEL; k += LANES)
      _mm256_storeu_ps(
          out + at + k, _mm256_fmadd_ps(
                            _mm256_loadu_ps(c + k), _mm256_loadu_ps(g + k),
                            _mm256_loadu_ps(x + at + k)));
  }
};

// Turns one row of a head (dim) by its angles.
inline void rotate(const float* c, const float* cos, const float* sin, int64_t dim, float* to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const __m256 first = _mm256_loadu_ps(c + i), second = _mm256_loadu_ps(c + half + i);
    const __m256 a = _mm256_mul_ps(first, _mm256_loadu_ps(cos + i));
    const __m256 b = _mm256_mul_ps(second, _mm256_loadu_ps(cos + half + i));
    _mm256_storeu_ps(to + i, _mm256_fmadd_ps(second, _mm256_loadu_ps(sin + i), a));
    _mm256_storeu_ps(to + half + i, _mm256_fmadd_ps(first, _mm256_loadu_ps(sin + half + i), b));
  }
}

// The part of one thread: items [begin, end) of `count`.
struct Part {
  int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  int64_t begin(int64_t count) const { return count * thread / team; }
  int64_t end(int64_t count) const { return count * (thread + 1) / team; }
};

// Hands out aligned parts of a workspace; with a null workspace it only measures it.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  float* take(int64_t count) {
    char* here = base_ + used_;
    used_ += (count * int64_t(sizeof(float)) + 63) / 64 * 64;
    return (float*)here;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace

// out = x + gate[level] x down(silu(g) x u), (g, u) = halves of in(norm(x) factor[level] + shift[level]).
extern "C" int64_t mlp(
    const float* x, const float* factor, const float* shift, const float* gate, const int32_t* rows,
    const float* in_panels, const float* out_panels, float* out, int64_t tokens, int64_t width,
    int64_t inner, float eps, int64_t threads, char* workspace) {
  Arena arena(workspace);
  const int64_t most = std::min(TOKENS, tokens), stride = width + SPACE, wide = inner + SPACE;
  float *normed = arena.take(most * stride), *active = arena.take(most * wide);
  float* tiles = arena.take(threads * 2 * most * PANEL);
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, gate, rows, width, eps};
#pragma omp parallel num_threads(int(threads))
  {
    const Part part;
    float *c = tiles + part.thread * 2 * most * PANEL, *up = c + most * PANEL;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      const int64_t count = std::min(TOKENS, tokens - first);
      for (int64_t t = part.begin(count); t < part.end(count); ++t)
        h.normalise(first + t, normed + t * stride);
#pragma omp barrier
      for (int64_t j = part.begin(inner / PANEL); j < part.end(inner / PANEL); ++j) {
        product(normed, stride, count, in_panels + j * width * PANEL, width, c);
        product(normed, stride, count, in_panels + (inner / PANEL + j) * width * PANEL, width, up);
        for (int64_t t = 0; t < count; ++t)
          for (int64_t k = 0; k < PANEL; k += LANES) {
            const __m256 g = _mm256_loadu_ps(c + t * PANEL + k);
            const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), g));
            const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1), e));
            const __m256 value = _mm256_mul_ps(silu, _mm256_loadu_ps(up + t * PANEL + k));
            _mm256_storeu_ps(active + t * wide + j * PANEL + k, value);
          }
      }
#pragma omp barrier
      for (int64_t n = part.begin(width / PANEL); n < part.end(width / PANEL); ++n) {
        product(active, wide, count, out_panels + n * inner * PANEL, inner, c);
        for (int64_t t = 0; t < count; ++t) h.add_gated(first + t, c + t * PANEL, n * PANEL, out);
      }
    }
  }
  return 0;
}

// Heads (tokens, heads, dim) = in(norm(x) factor[level] + shift[level]), the first `turned` of them
// rotated; token t has the angles of row t % angles.
extern "C" int64_t project(
    const float* x, const float* factor, const float* shift, const int32_t* rows,
    const float* panels, const float* cos, const float* sin, float* out, int64_t tokens,
    int64_t width, int64_t heads, int64_t turned, int64_t dim, int64_t angles, float eps,
    int64_t threads, char* workspace) {
  Arena arena(workspace);
  const int64_t most = std::min(TOKENS, tokens), stride = width + SPACE;
  float *normed = arena.take(most * stride), *tiles = arena.take(threads * (most + 1) * dim);
  if (workspace == nullptr) return arena.used();
  const Half h{x, factor, shift, nullptr, rows, width, eps};
#pragma omp parallel num_threads(int(threads))
  {
    const Part part;
    float* c = tiles + part.thread * (most + 1) * dim;
    float* head_row = c + most * dim;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      const int64_t count = std::min(TOKENS, tokens - first);
      for (int64_t t = part.begin(count); t < part.end(count); ++t)
        h.normalise(first + t, normed + t * stride);
#pragma omp barrier
      for (int64_t head = part.begin(heads); head < part.end(heads); ++head) {
        for (int64_t i = 0; i < dim; i += PANEL)
          product(normed, stride, count, panels + (head * dim + i) * width, width, c + i * count);
        for (int64_t t = 0; t < count; ++t) {
          float* to = out + ((first + t) * heads + head) * dim;
          float* row = head < turned ? head_row : to;
          for (int64_t i = 0; i < dim; i += PANEL)
            for (int64_t k = 0; k < PANEL; k += LANES)
              _mm256_storeu_ps(row + i + k, _mm256_loadu_ps(c + i * count + t * PANEL + k));
          const int64_t angle = (first + t) % angles * dim;
          if (head < turned) rotate(head_row, cos + angle, sin + angle, dim, to);
        }
      }
#pragma omp barrier
    }
  }
  return 0;
}

// out = x + gate[level] x to_out(attended).
extern "C" int64_t add_projected(
    const float* x, const float* gate, const int32_t* rows, const float* attended,
    const float* panels, float* out, int64_t tokens, int64_t width, int64_t inner, int64_t threads,
    char* workspace) {
  Arena arena(workspace);
  const int64_t most = std::min(TOKENS, tokens);
  float* tiles = arena.take(threads * most * PANEL);
  if (workspace == nullptr) return arena.used();
  const Half h{x, nullptr, nullptr, gate, rows, width, 0};
#pragma omp parallel num_threads(int(threads))
  {
    const Part part;
    float* c = tiles + part.thread * most * PANEL;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      const int64_t count = std::min(TOKENS, tokens - first);
      for (int64_t n = part.begin(width / PANEL); n < part.end(width / PANEL); ++n) {
        product(attended + first * inner, inner, count, panels + n * inner * PANEL, inner, c);
        for (int64_t t = 0; t < count; ++t) h.add_gated(first + t, c + t * PANEL, n * PANEL, out);
      }
    }
  }
  return 0;
}

// A weight (rows, columns) as panels.
extern "C" void pack(const float* weight, float* panels, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < rows; n += PANEL)
    for (int64_t k = 0; k < columns; ++k)
      for (int64_t r = 0; r < PANEL; ++r)
        panels[n * columns + k * PANEL + r] = weight[(n + r) * columns + k];
}

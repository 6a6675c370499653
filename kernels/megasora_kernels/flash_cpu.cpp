// Flash attention in bf16 for CPUs with AVX512-BF16 (Dao 2023): forward, and backward from the logarithms.
//
// All products run through one microkernel, `tile`, on pairs of bf16 beside each other along the summed dimension:
//     C [rows, columns] fp32 (+)= A · B,   A's pairs wherever they lie, B's packed in panels of 64 columns: [panel][pair][64].
// A sequence's keys are met a block at a time, sums are fp32, and logits never leave fp32. Only P and dS are rounded to bf16,
// as they are in flash attention on a GPU.
//
// n sequences of L queries and M keys, N heads of K channels (a multiple of 16); q, out, dq [n, L, N, K], k, v, dk, dv
// [n, M, N, K], lse [n, L, N] fp32. A head of a sequence is one task of one thread, and writes what no other does.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the first in the low half

constexpr int64_t LANES = 16, PANEL = 64;       // floats in a register; columns of a panel of B
constexpr int64_t QUERIES = 48, KEYS = 256;     // of a block: its tiles stay in L2
constexpr int64_t ROWS = 6;                     // of a tile: 6 x 4 sums, 4 of B and 1 of A fill the registers

int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T> class Buffer {  // aligned to a cache line
  std::vector<T> memory_;
 public:
  explicit Buffer(int64_t size) : memory_(size + PANEL / sizeof(T)) {}
  T* get() { return reinterpret_cast<T*>(up(reinterpret_cast<int64_t>(memory_.data()), PANEL)); }
};

// One head of one sequence, wherever it lies.
template <class T> struct Head {
  T* at;
  int64_t stride;  // from token to token
  T* row(int64_t i) const { return at + i * stride; }
};

// A: pairs of a row `row` apart and of the summed dimension `step` apart.
struct Pairs {
  const pair* at;
  int64_t row, step;
};

template <int R, int W, bool ADD>
void tile(Pairs a, const pair* b, int64_t width, int64_t depth, float* c, int64_t ldc) {
  __m512 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = ADD ? _mm512_loadu_ps(c + r * ldc + w * LANES) : _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; ++d) {
    __m512bh right[W];
    for (int w = 0; w < W; ++w) right[w] = (__m512bh)_mm512_load_si512(b + d * width + w * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(a.at[r * a.row + d * a.step]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], right[w], left);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) _mm512_storeu_ps(c + r * ldc + w * LANES, sum[r][w]);
}

template <int W, bool ADD>
void rows_of(Pairs a, const pair* b, int64_t rows, int64_t depth, float* c, int64_t ldc) {
  for (; rows >= ROWS; rows -= ROWS, a.at += ROWS * a.row, c += ROWS * ldc) tile<ROWS, W, ADD>(a, b, W * LANES, depth, c, ldc);
  for (; rows > 0; --rows, a.at += a.row, c += ldc) tile<1, W, ADD>(a, b, W * LANES, depth, c, ldc);
}

// c [rows, columns] (+)= a · b. Columns: a multiple of LANES; the last panel is as narrow as need be.
template <bool ADD>
void multiply(Pairs a, const pair* b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (; columns > 0; columns -= PANEL, b += PANEL * depth, c += PANEL) {
    switch (std::min(columns, PANEL) / LANES) {
      case 4: rows_of<4, ADD>(a, b, rows, depth, c, ldc); break;
      case 3: rows_of<3, ADD>(a, b, rows, depth, c, ldc); break;
      case 2: rows_of<2, ADD>(a, b, rows, depth, c, ldc); break;
      default: rows_of<1, ADD>(a, b, rows, depth, c, ldc);
    }
  }
}

__m512i widened(const bf16* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
__m512 floats(const bf16* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(widened(x), 16)); }
__m512i interleaved(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }
__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
void store(bf16* at, __m512 x) { _mm256_storeu_si256((__m256i*)at, rounded(x)); }

// B of x [tokens, K] summed over tokens: [panel][tokens / 2][64] pairs of two tokens. Tokens that are not there are zero.
void pack_tokens(Head<const bf16> x, int64_t tokens, int64_t K, pair* b) {
  const int64_t depth = up(tokens, 2) / 2;
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t c = 0; c < K; c += LANES) {
      const int64_t panel = c / PANEL * PANEL, width = std::min(PANEL, K - panel);
      const __m512i first = widened(x.row(2 * d) + c);
      const __m512i second = 2 * d + 1 < tokens ? widened(x.row(2 * d + 1) + c) : _mm512_setzero_si512();
      _mm512_store_si512(b + panel * depth + d * width + c - panel, interleaved(first, second));
    }
}

// B of the transposed x, summed over channels: [panel][K / 2][64] pairs of two channels, a token a column.
void pack_channels(Head<const bf16> x, int64_t tokens, int64_t K, pair* b) {
  const int64_t depth = K / 2, columns = up(tokens, LANES);
  for (int64_t t = 0; t < columns; t += LANES) {
    const int64_t panel = t / PANEL * PANEL, width = std::min(PANEL, columns - panel);
    const __mmask16 there = tokens - t >= LANES ? 0xffff : (1 << (tokens - t)) - 1;
    const __m512i places = _mm512_mullo_epi32(_mm512_set1_epi32(x.stride * sizeof(bf16)),
                                              _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t d = 0; d < depth; ++d) {
      const __m512i y = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, (const int*)x.row(t) + d, 1);
      _mm512_store_si512(b + panel * depth + d * width + t - panel, y);
    }
  }
}

Pairs pairs(Head<const bf16> x, int64_t first) { return {(const pair*)x.row(first), x.stride / 2, 1}; }

// exp, to 2 units in the last place: 2^i · 2^f, f in [-1/2, 1/2], by a polynomial. Below the smallest float: 0.
__m512 exponential(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), _mm512_set1_ps(-150.f));
  const __m512 i = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(y, i);
  __m512 p = _mm512_set1_ps(1.5403530393381608e-4f);  // ln2^k / k!
  for (const float c : {1.3333558146428443e-3f, 9.618129107628477e-3f, 5.550410866482158e-2f, 2.402265069591007e-1f,
                        6.931471805599453e-1f, 1.f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, i);
}

struct Shape {
  int64_t n, L, M, N, K;
  float scale;
};

void forward(const Shape& s, Head<const bf16> q, Head<const bf16> k, Head<const bf16> v, Head<bf16> out, Head<float> lse) {
  const int64_t K = s.K, whole = up(KEYS, LANES);
  Buffer<pair> keys_(up(s.M, LANES) * K / 2), values_(up(s.M, 2) * K / 2 + KEYS * K);
  Buffer<float> logits_(QUERIES * whole), sums_(QUERIES * K);
  Buffer<bf16> chances_(QUERIES * whole);
  pair *keys = keys_.get(), *values = values_.get();
  float *logits = logits_.get(), *sums = sums_.get();
  bf16* chances = chances_.get();
  for (int64_t m = 0; m < s.M; m += KEYS) {  // a block of keys after the other
    const int64_t count = std::min(KEYS, s.M - m);
    pack_channels({k.row(m), k.stride}, count, K, keys + m * K / 2);
    pack_tokens({v.row(m), v.stride}, count, K, values + m * K / 2);
  }
  float most[QUERIES], total[QUERIES];
  for (int64_t l = 0; l < s.L; l += QUERIES) {
    const int64_t rows = std::min(QUERIES, s.L - l);
    std::fill_n(most, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(total, rows, 0.f);
    std::fill_n(sums, rows * K, 0.f);
    for (int64_t m = 0; m < s.M; m += KEYS) {
      const int64_t count = std::min(KEYS, s.M - m), columns = up(count, LANES);
      multiply<false>(pairs(q, l), keys + m * K / 2, rows, columns, K / 2, logits, whole);
      for (int64_t r = 0; r < rows; ++r) {
        float* x = logits + r * whole;
        for (int64_t c = count; c < columns; ++c) x[c] = -std::numeric_limits<float>::infinity();
        __m512 top = _mm512_set1_ps(most[r]);
        for (int64_t c = 0; c < columns; c += LANES)
          top = _mm512_max_ps(top, _mm512_mul_ps(_mm512_load_ps(x + c), _mm512_set1_ps(s.scale)));
        const float now = _mm512_reduce_max_ps(top), shrink = std::exp(most[r] - now);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < columns; c += LANES) {
          const __m512 p = exponential(_mm512_fmsub_ps(_mm512_load_ps(x + c), _mm512_set1_ps(s.scale), _mm512_set1_ps(now)));
          sum = _mm512_add_ps(sum, p);
          store(chances + r * whole + c, p);
        }
        total[r] = total[r] * shrink + _mm512_reduce_add_ps(sum);
        if (shrink != 1.f)
          for (int64_t c = 0; c < K; c += LANES)
            _mm512_store_ps(sums + r * K + c, _mm512_mul_ps(_mm512_load_ps(sums + r * K + c), _mm512_set1_ps(shrink)));
        most[r] = now;
      }
      multiply<true>({(const pair*)chances, whole / 2, 1}, values + m * K / 2, rows, K, up(count, 2) / 2, sums, K);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < K; c += LANES)
        store(out.row(l + r) + c, _mm512_div_ps(_mm512_load_ps(sums + r * K + c), _mm512_set1_ps(total[r])));
      *lse.row(l + r) = most[r] + std::log(total[r]);
    }
  }
}

// Two rows of floats as bf16: each for itself, and as pairs of one beside the other.
void round_two(__m512 first, __m512 second, bf16* one, bf16* other, pair* beside) {
  const __m256i a = rounded(first), b = rounded(second);
  if (one) _mm256_store_si256((__m256i*)one, a);
  if (other) _mm256_store_si256((__m256i*)other, b);
  _mm512_store_si512(beside, interleaved(_mm512_cvtepu16_epi32(a), _mm512_cvtepu16_epi32(b)));
}

void backward(const Shape& s, Head<const bf16> grad, Head<const bf16> q, Head<const bf16> k, Head<const bf16> v,
              Head<const bf16> out, Head<const float> lse, Head<bf16> dq, Head<bf16> dk, Head<bf16> dv) {
  const int64_t K = s.K;
  // B of the queries and of the gradient, a block after the other; of a block of keys: K^T, V^T, K.
  Buffer<pair> q_(up(s.L, QUERIES) * K / 2), grad_(up(s.L, QUERIES) * K / 2), k_(KEYS * K / 2), v_(KEYS * K / 2), kt_(KEYS * K / 2);
  Buffer<pair> p_pairs_(QUERIES / 2 * KEYS), ds_pairs_(QUERIES / 2 * KEYS);
  Buffer<bf16> ds_(QUERIES * KEYS);
  Buffer<float> logits_(QUERIES * KEYS), dp_(QUERIES * KEYS), dq_(s.L * K), dk_(KEYS * K), dv_(KEYS * K), delta_(s.L);
  pair *qb = q_.get(), *gb = grad_.get(), *kb = k_.get(), *vb = v_.get(), *kt = kt_.get();
  pair *p_pairs = p_pairs_.get(), *ds_pairs = ds_pairs_.get();
  bf16* ds = ds_.get();
  float *logits = logits_.get(), *dp = dp_.get(), *dqs = dq_.get(), *dks = dk_.get(), *dvs = dv_.get(), *delta = delta_.get();
  for (int64_t l = 0; l < s.L; l += QUERIES) {
    const int64_t rows = std::min(QUERIES, s.L - l);
    pack_tokens({q.row(l), q.stride}, rows, K, qb + l * K / 2);
    pack_tokens({grad.row(l), grad.stride}, rows, K, gb + l * K / 2);
  }
  for (int64_t l = 0; l < s.L; ++l) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < K; c += LANES) sum = _mm512_fmadd_ps(floats(grad.row(l) + c), floats(out.row(l) + c), sum);
    delta[l] = _mm512_reduce_add_ps(sum);
  }
  std::fill_n(dqs, s.L * K, 0.f);
  for (int64_t m = 0; m < s.M; m += KEYS) {
    const int64_t count = std::min(KEYS, s.M - m), columns = up(count, LANES);
    pack_channels({k.row(m), k.stride}, count, K, kb);
    pack_channels({v.row(m), v.stride}, count, K, vb);
    pack_tokens({k.row(m), k.stride}, count, K, kt);
    std::fill_n(dks, columns * K, 0.f);
    std::fill_n(dvs, columns * K, 0.f);
    for (int64_t l = 0; l < s.L; l += QUERIES) {
      const int64_t rows = std::min(QUERIES, s.L - l), even = up(rows, 2);
      multiply<false>(pairs(q, l), kb, rows, columns, K / 2, logits, KEYS);
      multiply<false>(pairs(grad, l), vb, rows, columns, K / 2, dp, KEYS);
      for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += LANES) {
          __m512 p[2], g[2];
          for (int i = 0; i < 2; ++i) {
            p[i] = g[i] = _mm512_setzero_ps();
            if (r + i >= rows) continue;
            const int64_t place = (r + i) * KEYS + c;
            const __m512 x = _mm512_load_ps(logits + place);
            p[i] = exponential(_mm512_fmsub_ps(x, _mm512_set1_ps(s.scale), _mm512_set1_ps(*lse.row(l + r + i))));
            if (c + LANES > count) p[i] = _mm512_maskz_mov_ps((1 << (count - c)) - 1, p[i]);
            g[i] = _mm512_mul_ps(_mm512_mul_ps(p[i], _mm512_set1_ps(s.scale)),
                                 _mm512_sub_ps(_mm512_load_ps(dp + place), _mm512_set1_ps(delta[l + r + i])));
          }
          round_two(p[0], p[1], nullptr, nullptr, p_pairs + r / 2 * KEYS + c);
          round_two(g[0], g[1], ds + r * KEYS + c, ds + (r + 1) * KEYS + c, ds_pairs + r / 2 * KEYS + c);
        }
      multiply<true>({(const pair*)ds, KEYS / 2, 1}, kt, rows, K, up(count, 2) / 2, dqs + l * K, K);
      multiply<true>({p_pairs, 1, KEYS}, gb + l * K / 2, count, K, even / 2, dvs, K);
      multiply<true>({ds_pairs, 1, KEYS}, qb + l * K / 2, count, K, even / 2, dks, K);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = 0; c < K; c += LANES) {
        store(dk.row(m + t) + c, _mm512_load_ps(dks + t * K + c));
        store(dv.row(m + t) + c, _mm512_load_ps(dvs + t * K + c));
      }
  }
  for (int64_t t = 0; t < s.L; ++t)
    for (int64_t c = 0; c < K; c += LANES) store(dq.row(t) + c, _mm512_load_ps(dqs + t * K + c));
}

// Task i of n · N: the head of a tensor [n, length, N, width].
template <class T> Head<T> head(T* x, int64_t i, const Shape& s, int64_t length, int64_t width) {
  return {x + (i / s.N * length * s.N + i % s.N) * width, s.N * width};
}

}  // namespace

extern "C" void flash_cpu_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, int64_t n, int64_t L,
                                  int64_t M, int64_t N, int64_t K, float scale, int threads) {
  const Shape s{n, L, M, N, K, scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < n * N; ++i)
    forward(s, head(q, i, s, L, K), head(k, i, s, M, K), head(v, i, s, M, K), head(out, i, s, L, K), head(lse, i, s, L, 1));
}

extern "C" void flash_cpu_backward(const bf16* grad, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse,
                                   bf16* dq, bf16* dk, bf16* dv, int64_t n, int64_t L, int64_t M, int64_t N, int64_t K, float scale,
                                   int threads) {
  const Shape s{n, L, M, N, K, scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < n * N; ++i)
    backward(s, head(grad, i, s, L, K), head(q, i, s, L, K), head(k, i, s, M, K), head(v, i, s, M, K), head(out, i, s, L, K),
             head(lse, i, s, L, 1), head(dq, i, s, L, K), head(dk, i, s, M, K), head(dv, i, s, M, K));
}

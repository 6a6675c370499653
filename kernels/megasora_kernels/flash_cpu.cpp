// Flash attention for CPUs with AVX512-BF16 (Dao 2023), in fp32 and bf16: forward, and backward from the logarithms.
//
// All products run through one microkernel, `tile`, on units of 32 bits: a float, or two bf16 beside each other along the summed
// dimension.
//     C [rows, columns] fp32 (+)= A · B,   A's units wherever they lie, B's packed in panels of 64 columns: [panel][unit][64].
// A sequence's keys are met a block at a time, sums are fp32, and logits never leave fp32. Of bf16 only P and dS are rounded, as
// they are in flash attention on a GPU.
//
// n sequences of L queries and M keys, N heads of K channels (a multiple of 16); q, out, dq [n, L, N, K], k, v, dk, dv
// [n, M, N, K], lse [n, L, N] fp32. A head of a sequence is one task of one thread, and writes what no other does.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

namespace {

using bf16 = uint16_t;
using unit = uint32_t;  // a float, or two bf16, the first in the low half

template <class T> constexpr int64_t PER = sizeof(unit) / sizeof(T);  // numbers of a unit
constexpr int64_t LANES = 16, PANEL = 64;   // units in a register; columns of a panel of B
constexpr int64_t QUERIES = 48, KEYS = 256;  // of a block: its tiles stay in L2
constexpr int64_t ROWS = 6;                  // of a tile: 6 x 4 sums, 4 of B and 1 of A fill the registers

int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
template <class T> int64_t units(int64_t numbers) { return (numbers + PER<T> - 1) / PER<T>; }

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};
// Memory of one thread for all its tasks, aligned to a cache line and not cleared.
template <class T> class Buffer {
  std::unique_ptr<T, Freed> memory_;
 public:
  explicit Buffer(int64_t size) : memory_(static_cast<T*>(std::aligned_alloc(64, up(size * sizeof(T) + 1, 64)))) {
    if (!memory_) throw std::bad_alloc();
  }
  operator T*() const { return memory_.get(); }
};

// One head of one sequence, wherever it lies.
template <class T> struct Head {
  T* at;
  int64_t stride;  // from token to token
  T* row(int64_t i) const { return at + i * stride; }
};

// A: units of a row `row` apart and of the summed dimension `step` apart.
struct Left {
  const unit* at;
  int64_t row, step;
};
template <class T> Left by_row(const T* at, int64_t stride) { return {(const unit*)at, stride / PER<T>, 1}; }

template <class T> __m512 add_product(__m512 sum, __m512i right, unit left) {
  const __m512i every = _mm512_set1_epi32(left);
  if constexpr (std::is_same_v<T, float>) return _mm512_fmadd_ps(_mm512_castsi512_ps(right), _mm512_castsi512_ps(every), sum);
  else return _mm512_dpbf16_ps(sum, (__m512bh)right, (__m512bh)every);
}

template <class T, int R, int W, bool ADD>
void tile(Left a, const unit* b, int64_t depth, float* c, int64_t ldc) {
  __m512 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = ADD ? _mm512_loadu_ps(c + r * ldc + w * LANES) : _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; ++d) {
    __m512i right[W];
    for (int w = 0; w < W; ++w) right[w] = _mm512_load_si512(b + (d * W + w) * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] = add_product<T>(sum[r][w], right[w], a.at[r * a.row + d * a.step]);
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) _mm512_storeu_ps(c + r * ldc + w * LANES, sum[r][w]);
}

template <class T, int W, bool ADD>
void rows_of(Left a, const unit* b, int64_t rows, int64_t depth, float* c, int64_t ldc) {
  for (; rows >= ROWS; rows -= ROWS, a.at += ROWS * a.row, c += ROWS * ldc) tile<T, ROWS, W, ADD>(a, b, depth, c, ldc);
  for (; rows > 0; --rows, a.at += a.row, c += ldc) tile<T, 1, W, ADD>(a, b, depth, c, ldc);
}

// c [rows, columns] (+)= a · b. Columns: a multiple of LANES; the last panel is as narrow as need be. `depth` in units.
template <class T, bool ADD>
void multiply(Left a, const unit* b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (; columns > 0; columns -= PANEL, b += PANEL * depth, c += PANEL) {
    switch (std::min(columns, PANEL) / LANES) {
      case 4: rows_of<T, 4, ADD>(a, b, rows, depth, c, ldc); break;
      case 3: rows_of<T, 3, ADD>(a, b, rows, depth, c, ldc); break;
      case 2: rows_of<T, 2, ADD>(a, b, rows, depth, c, ldc); break;
      default: rows_of<T, 1, ADD>(a, b, rows, depth, c, ldc);
    }
  }
}

__m512i widened(const bf16* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
__m512i interleaved(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }
__m512 floats(const bf16* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(widened(x), 16)); }
__m512 floats(const float* x) { return _mm512_loadu_ps(x); }
__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
void store(bf16* at, __m512 x) { _mm256_storeu_si256((__m256i*)at, rounded(x)); }
void store(float* at, __m512 x) { _mm512_storeu_ps(at, x); }

// B of x [tokens, K] summed over tokens: [panel][units of tokens][64]. What fills the last unit is zero.
template <class T> void pack_tokens(Head<const T> x, int64_t tokens, int64_t K, unit* b) {
  const int64_t depth = units<T>(tokens);
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t c = 0; c < K; c += LANES) {
      const int64_t panel = c / PANEL * PANEL, width = std::min(PANEL, K - panel);
      __m512i y;
      if constexpr (PER<T> == 1) y = _mm512_loadu_si512(x.row(d) + c);
      else
        y = interleaved(widened(x.row(2 * d) + c), 2 * d + 1 < tokens ? widened(x.row(2 * d + 1) + c) : _mm512_setzero_si512());
      _mm512_store_si512(b + panel * depth + d * width + c - panel, y);
    }
}

// B of the transposed x, summed over channels: [panel][units of channels][64], a token a column.
template <class T> void pack_channels(Head<const T> x, int64_t tokens, int64_t K, unit* b) {
  const int64_t depth = K / PER<T>, columns = up(tokens, LANES);
  const __m512i places = _mm512_mullo_epi32(_mm512_set1_epi32(x.stride * sizeof(T)),
                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t t = 0; t < columns; t += LANES) {
    const int64_t panel = t / PANEL * PANEL, width = std::min(PANEL, columns - panel);
    const __mmask16 there = tokens - t >= LANES ? 0xffff : (1 << (tokens - t)) - 1;
    for (int64_t d = 0; d < depth; ++d) {
      const __m512i y = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, (const int*)x.row(t) + d, 1);
      _mm512_store_si512(b + panel * depth + d * width + t - panel, y);
    }
  }
}

// exp, to 2 units in the last place: 2^i · 2^f, f in [-1/2, 1/2], by a polynomial. Below the smallest float: 0. Of NaN: NaN,
// since max gives its second operand there.
__m512 exponential(__m512 x) {
  const __m512 log2_e = _mm512_set1_ps(1.44269504088896f), y = _mm512_max_ps(_mm512_set1_ps(-104.f), x);
  const __m512 i = _mm512_roundscale_ps(_mm512_mul_ps(y, log2_e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(y, log2_e, i);
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

// What forward passes put down on the way: B of the keys and values, and of a block of queries its logits, P and sums.
template <class T> struct ForwardRoom {
  Buffer<unit> keys, values;
  Buffer<float> logits, sums;
  Buffer<T> chances;
  explicit ForwardRoom(const Shape& s)
      : keys(up(s.M, LANES) * s.K / PER<T>), values(units<T>(s.M) * s.K), logits(QUERIES * KEYS), sums(QUERIES * s.K),
        chances(QUERIES * KEYS) {}
};

template <class T>
void forward(const Shape& s, const ForwardRoom<T>& room, Head<const T> q, Head<const T> k, Head<const T> v, Head<T> out,
             Head<float> lse) {
  const int64_t K = s.K, whole = KEYS, of_channels = K / PER<T>;
  unit *keys = room.keys, *values = room.values;
  float *logits = room.logits, *sums = room.sums;
  T* chances = room.chances;
  for (int64_t m = 0; m < s.M; m += KEYS) {  // a block of keys after the other
    const int64_t count = std::min(KEYS, s.M - m);
    pack_channels<T>({k.row(m), k.stride}, count, K, keys + m * of_channels);
    pack_tokens<T>({v.row(m), v.stride}, count, K, values + units<T>(m) * K);
  }
  float most[QUERIES], total[QUERIES];
  for (int64_t l = 0; l < s.L; l += QUERIES) {
    const int64_t rows = std::min(QUERIES, s.L - l);
    std::fill_n(most, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(total, rows, 0.f);
    std::fill_n(sums, rows * K, 0.f);
    for (int64_t m = 0; m < s.M; m += KEYS) {
      const int64_t count = std::min(KEYS, s.M - m), columns = up(count, LANES);
      multiply<T, false>(by_row(q.row(l), q.stride), keys + m * of_channels, rows, columns, of_channels, logits, whole);
      for (int64_t r = 0; r < rows; ++r) {
        float* x = logits + r * whole;
        for (int64_t c = count; c < columns; ++c) x[c] = -std::numeric_limits<float>::infinity();
        __m512 top = _mm512_set1_ps(most[r]);  // of what is no NaN, which comes to the sum by its exp
        for (int64_t c = 0; c < columns; c += LANES)
          top = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(x + c), _mm512_set1_ps(s.scale)), top);
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
      multiply<T, true>(by_row(chances, whole), values + units<T>(m) * K, rows, K, units<T>(count), sums, K);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < K; c += LANES)
        store(out.row(l + r) + c, _mm512_div_ps(_mm512_load_ps(sums + r * K + c), _mm512_set1_ps(total[r])));
      *lse.row(l + r) = most[r] + std::log(total[r]);
    }
  }
}

// Rows of floats that make up a unit along the queries: each for itself, and as units.
void keep(const __m512* x, float* rows, int64_t, unit*) { _mm512_store_ps(rows, x[0]); }
void keep(const __m512* x, bf16* rows, int64_t stride, unit* beside) {
  const __m256i a = rounded(x[0]), b = rounded(x[1]);
  _mm256_store_si256((__m256i*)rows, a);
  _mm256_store_si256((__m256i*)(rows + stride), b);
  _mm512_store_si512(beside, interleaved(_mm512_cvtepu16_epi32(a), _mm512_cvtepu16_epi32(b)));
}

// What backward passes put down: B of the queries and of the gradient, a block after the other; of a block of keys B of K^T, V^T
// and K; P and dS, and the same as units of queries, which of floats they are by themselves; gradients in fp32.
template <class T> struct BackwardRoom {
  static constexpr int64_t BESIDE = PER<T> == 1 ? 0 : QUERIES / PER<T> * KEYS;
  Buffer<unit> queries, grads, kt, vt, keys, p_units, ds_units;
  Buffer<T> p, ds;
  Buffer<float> logits, dp, dq, dk, dv, delta;
  explicit BackwardRoom(const Shape& s)
      : queries(units<T>(up(s.L, QUERIES)) * s.K), grads(units<T>(up(s.L, QUERIES)) * s.K), kt(KEYS * s.K / PER<T>),
        vt(KEYS * s.K / PER<T>), keys(KEYS * s.K / PER<T>), p_units(BESIDE), ds_units(BESIDE), p(QUERIES * KEYS),
        ds(QUERIES * KEYS), logits(QUERIES * KEYS), dp(QUERIES * KEYS), dq(s.L * s.K), dk(KEYS * s.K), dv(KEYS * s.K),
        delta(s.L) {}
};

template <class T>
void backward(const Shape& s, const BackwardRoom<T>& room, Head<const T> grad, Head<const T> q, Head<const T> k, Head<const T> v,
              Head<const T> out, Head<const float> lse, Head<T> dq, Head<T> dk, Head<T> dv) {
  const int64_t K = s.K, of_channels = K / PER<T>;
  unit *qb = room.queries, *gb = room.grads, *kt = room.kt, *vt = room.vt, *kb = room.keys;
  T *p = room.p, *ds = room.ds;
  unit *p_units = PER<T> == 1 ? (unit*)p : room.p_units, *ds_units = PER<T> == 1 ? (unit*)ds : room.ds_units;
  float *logits = room.logits, *dp = room.dp, *dqs = room.dq, *dks = room.dk, *dvs = room.dv, *delta = room.delta;
  for (int64_t l = 0; l < s.L; l += QUERIES) {
    const int64_t rows = std::min(QUERIES, s.L - l);
    pack_tokens<T>({q.row(l), q.stride}, rows, K, qb + units<T>(l) * K);
    pack_tokens<T>({grad.row(l), grad.stride}, rows, K, gb + units<T>(l) * K);
  }
  for (int64_t l = 0; l < s.L; ++l) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < K; c += LANES) sum = _mm512_fmadd_ps(floats(grad.row(l) + c), floats(out.row(l) + c), sum);
    delta[l] = _mm512_reduce_add_ps(sum);
  }
  std::fill_n(dqs, s.L * K, 0.f);
  for (int64_t m = 0; m < s.M; m += KEYS) {
    const int64_t count = std::min(KEYS, s.M - m), columns = up(count, LANES);
    pack_channels<T>({k.row(m), k.stride}, count, K, kt);
    pack_channels<T>({v.row(m), v.stride}, count, K, vt);
    pack_tokens<T>({k.row(m), k.stride}, count, K, kb);
    std::fill_n(dks, columns * K, 0.f);
    std::fill_n(dvs, columns * K, 0.f);
    for (int64_t l = 0; l < s.L; l += QUERIES) {
      const int64_t rows = std::min(QUERIES, s.L - l);
      multiply<T, false>(by_row(q.row(l), q.stride), kt, rows, columns, of_channels, logits, KEYS);
      multiply<T, false>(by_row(grad.row(l), grad.stride), vt, rows, columns, of_channels, dp, KEYS);
      for (int64_t r = 0; r < rows; r += PER<T>)
        for (int64_t c = 0; c < columns; c += LANES) {
          __m512 chance[PER<T>], slope[PER<T>];
          for (int i = 0; i < PER<T>; ++i) {
            chance[i] = slope[i] = _mm512_setzero_ps();
            if (r + i >= rows) continue;
            const int64_t place = (r + i) * KEYS + c;
            const __m512 x = _mm512_load_ps(logits + place);
            chance[i] = exponential(_mm512_fmsub_ps(x, _mm512_set1_ps(s.scale), _mm512_set1_ps(*lse.row(l + r + i))));
            // Beside the last key lies padding, whose exp may be infinite.
            if (c + LANES > count) chance[i] = _mm512_maskz_mov_ps((1 << (count - c)) - 1, chance[i]);
            slope[i] = _mm512_mul_ps(_mm512_mul_ps(chance[i], _mm512_set1_ps(s.scale)),
                                     _mm512_sub_ps(_mm512_load_ps(dp + place), _mm512_set1_ps(delta[l + r + i])));
          }
          keep(chance, p + r * KEYS + c, KEYS, p_units + r / PER<T> * KEYS + c);
          keep(slope, ds + r * KEYS + c, KEYS, ds_units + r / PER<T> * KEYS + c);
        }
      multiply<T, true>(by_row(ds, KEYS), kb, rows, K, units<T>(count), dqs + l * K, K);
      multiply<T, true>({p_units, 1, KEYS}, gb + units<T>(l) * K, count, K, units<T>(rows), dvs, K);
      multiply<T, true>({ds_units, 1, KEYS}, qb + units<T>(l) * K, count, K, units<T>(rows), dks, K);
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

template <class T>
void forward_all(const Shape& s, const T* q, const T* k, const T* v, T* out, float* lse, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const ForwardRoom<T> room(s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.n * s.N; ++i)
      forward<T>(s, room, head(q, i, s, s.L, s.K), head(k, i, s, s.M, s.K), head(v, i, s, s.M, s.K), head(out, i, s, s.L, s.K),
                 head(lse, i, s, s.L, 1));
  }
}

template <class T>
void backward_all(const Shape& s, const T* grad, const T* q, const T* k, const T* v, const T* out, const float* lse, T* dq, T* dk,
                  T* dv, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const BackwardRoom<T> room(s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.n * s.N; ++i)
      backward<T>(s, room, head(grad, i, s, s.L, s.K), head(q, i, s, s.L, s.K), head(k, i, s, s.M, s.K), head(v, i, s, s.M, s.K),
                head(out, i, s, s.L, s.K), head(lse, i, s, s.L, 1), head(dq, i, s, s.L, s.K), head(dk, i, s, s.M, s.K),
                head(dv, i, s, s.M, s.K));
  }
}

}  // namespace

#define INTERFACE(NAME, T)                                                                                                      \
  extern "C" void flash_cpu_forward_##NAME(const T* q, const T* k, const T* v, T* out, float* lse, int64_t n, int64_t L,         \
                                           int64_t M, int64_t N, int64_t K, float scale, int threads) {                         \
    forward_all<T>({n, L, M, N, K, scale}, q, k, v, out, lse, threads);                                                         \
  }                                                                                                                             \
  extern "C" void flash_cpu_backward_##NAME(const T* grad, const T* q, const T* k, const T* v, const T* out, const float* lse,  \
                                            T* dq, T* dk, T* dv, int64_t n, int64_t L, int64_t M, int64_t N, int64_t K,         \
                                            float scale, int threads) {                                                         \
    backward_all<T>({n, L, M, N, K, scale}, grad, q, k, v, out, lse, dq, dk, dv, threads);                                      \
  }

INTERFACE(bf16, bf16)
INTERFACE(fp32, float)

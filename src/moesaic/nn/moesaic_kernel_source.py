"""The `moesaic` architecture: the C++ source of its CPU kernel (see `moesaic_kernel.py`).

It is text in a Python file because transformers copies only such into a folder. There is no header of torch in it, so
that it compiles in seconds. `WEIGHT` is one of float, bf16, fp16. Vectors of 16 are GCC's and Clang's
extension: each compiler lowers them to what its CPU has.
"""

ROWS = r"""
// Exactly the wanted rows of a feed-forward network, for few tokens: y_t = sum over neurons p of
// w[t][p] * act(gate_p . x_t + b_p) * (up_p . x_t + b'_p) * down_p. Sums are fp32 whatever the weights are.
// Axes: T tokens, D model width, P neurons, E experts, K experts per token.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#define UNROLL _Pragma("GCC unroll 4")
#define UNROLLED _Pragma("GCC unroll 16")

extern "C" {
struct Call {  // the same fields as Call in moesaic_kernel.py
  const void *x, *gate, *up, *down, *gate_bias, *up_bias;  // gate and biases may be null
  const int64_t *chosen;       // [T, K]; null: every expert with weight 1
  const float *chosen_weight;  // [T, K]; null: 1
  const uint8_t *member;       // [E, P - shared]; null: expert e is expert_width rows from shared + e * expert_width
  void *y;                     // [T, D]
  int64_t tokens, d_model, neurons, shared, experts, expert_width, top_k;
  int64_t gate_stride, up_stride, down_stride;  // elements from a neuron to the next
  int64_t activation, threads;
};
}

enum { OK = 0, BAD_EXPERT = 1, NO_MEMORY = 2, UNKNOWN_ACTIVATION = 3 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU_SQUARED = 4 };
static const int BLOCK = 4;        // tokens that share a widened row
static const int STEP = 32;        // elements per turn of a loop: two vectors
static const int64_t SHARE = 256;  // rows for which a thread more is worth while

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

static inline f32x16 load(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
static inline u32x16 bits_of(const void *p) {
  u16x16 v;
  memcpy(&v, p, sizeof v);
#ifdef __AVX512F__
  return (u32x16)_mm512_cvtepu16_epi32((__m256i)v);  // GCC 12 makes three instructions of the conversion
#else
  return __builtin_convertvector(v, u32x16);
#endif
}
static inline f32x16 load(const bf16 *p) { return (f32x16)(bits_of(p) << 16); }
#ifdef __AVX512F__
static inline f32x16 load(const fp16 *p) {
  __m256i v;
  memcpy(&v, p, sizeof v);
  return (f32x16)_mm512_cvtph_ps(v);
}
#else
static inline f32x16 load(const fp16 *p) {
  u32x16 all = bits_of(p), rest = (all & 0x7fff) << 13;
  u32x16 finite = (u32x16)((f32x16)rest * 0x1p112f);  // right for subnormal numbers too
  u32x16 special = (u32x16)(rest >= 0x0f800000);      // infinity and NaN
  return (f32x16)((all & 0x8000) << 16 | (special & (rest | 0x7f800000)) | (~special & finite));
}
#endif
static inline float sum(f32x16 v) {
  float a[16];
  memcpy(a, &v, sizeof a);
  UNROLL for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float one(const float *p) { return *p; }
static inline float one(const bf16 *p) { return as_float((uint32_t)p->bits << 16); }
static inline float one(const fp16 *p) {
  const uint32_t rest = (p->bits & 0x7fffu) << 13, sign = (p->bits & 0x8000u) << 16;
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(as_float(rest) * 0x1p112f)));
}
static inline void narrow(float f, float *out) { *out = f; }
static inline void narrow(float f, bf16 *out) {
  uint32_t u = as_bits(f);
  out->bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void narrow(float f, fp16 *out) {
  uint32_t u = as_bits(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff, bits;
  if (rest > 0x7f800000) bits = 0x7e00;
  else if (rest >= 0x477ff000) bits = 0x7c00;  // 65520 and more round to infinity
  else if (rest < 0x38800000) bits = as_bits(as_float(rest) + 0.5f) - 0x3f000000;  // subnormal
  else bits = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  out->bits = (uint16_t)(sign | bits);
}

// e^v with a relative error of 2e-7, by v = n ln 2 + r and a polynomial for e^r. Below -87 it is e^-87, above 88 e^88.
static inline f32x16 exponential(f32x16 v) {
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  v = v < -87.0f ? -87.0f - (f32x16){} : v;
  v = v > 88.0f ? 88.0f - (f32x16){} : v;
  const f32x16 n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const f32x16 r = v - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// The complementary error function with a relative error of 2e-7: Numerical Recipes, 2nd edition, section 6.2.
static inline f32x16 erfc_of(f32x16 v) {
  static const float C[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
  const f32x16 size = v < 0 ? -v : v, t = 1.0f / (1.0f + 0.5f * size);
  f32x16 p = C[0] - (f32x16){};
  for (int i = 1; i < 10; i++) p = p * t + C[i];
  const f32x16 y = t * exponential(p - size * size);
  return v < 0 ? 2.0f - y : y;
}

static inline f32x16 activate(f32x16 v, int64_t kind) {
  switch (kind) {
    case SILU: return v / (1.0f + exponential(-v));
    case GELU: return 0.5f * v * erfc_of(v * -0.70710678f);
    case GELU_TANH: return v / (1.0f + exponential(-1.59576912f * (v + 0.044715f * v * v * v)));
    case RELU: return v < 0 ? (f32x16){} : v;
    default: return v < 0 ? (f32x16){} : v * v;
  }
}

// The cache lines of a turn of the loop, for the neuron after this one. Into L2: L1 is too small for a neuron.
template <class W> static inline void fetch(const W *p) {
  for (unsigned at = 0; at < STEP * sizeof(W); at += 64) __builtin_prefetch((const char *)p + at, 0, 2);
}

template <class W> struct Neuron { const W *gate, *up, *down; };

// gate . x_t and up . x_t of N tokens.
template <class W, int N, bool GATED>
static inline void dots(Neuron<W> own, Neuron<W> next, const float *const *x, int64_t d, float *gate, float *up) {
  f32x16 g[N][2] = {}, u[N][2] = {};
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    if (GATED) fetch(next.gate + i);
    fetch(next.up + i);
    UNROLL for (int half = 0; half < 2; half++) {
      const int64_t at = i + 16 * half;
      const f32x16 wu = load(own.up + at), wg = GATED ? load(own.gate + at) : wu;
      UNROLL for (int t = 0; t < N; t++) {
        const f32x16 xt = load(x[t] + at);
        u[t][half] += wu * xt;
        if (GATED) g[t][half] += wg * xt;
      }
    }
  }
  UNROLL for (int t = 0; t < N; t++) up[t] = sum(u[t][0] + u[t][1]), gate[t] = sum(g[t][0] + g[t][1]);
  for (; i < d; i++)
    for (int t = 0; t < N; t++) {
      up[t] += one(own.up + i) * x[t][i];
      if (GATED) gate[t] += one(own.gate + i) * x[t][i];
    }
}

// y_t += h_t * down of N tokens.
template <class W, int N>
static inline void add(Neuron<W> own, Neuron<W> next, const float *h, float *const *y, int64_t d) {
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    fetch(next.down + i);
    UNROLL for (int half = 0; half < 2; half++) {
      const int64_t at = i + 16 * half;
      const f32x16 w = load(own.down + at);
      UNROLL for (int t = 0; t < N; t++) {
        const f32x16 more = load(y[t] + at) + h[t] * w;
        memcpy(y[t] + at, &more, sizeof more);
      }
    }
  }
  for (; i < d; i++)
    for (int t = 0; t < N; t++) y[t][i] += h[t] * one(own.down + i);
}

template <class W, int N, bool GATED>
static inline void neuron(const Call &c, int64_t p, Neuron<W> own, Neuron<W> next, const float *const *x,
                          const float *weight, float *const *y) {
  float g[N], u[N], h[N];
  dots<W, N, GATED>(own, next, x, c.d_model, g, u);
  const float gate_bias = c.gate_bias ? one((const W *)c.gate_bias + p) : 0;
  const float up_bias = c.up_bias ? one((const W *)c.up_bias + p) : 0;
  f32x16 gates = {}, ups = {};
  for (int t = 0; t < N; t++) gates[t] = g[t], ups[t] = u[t];
  ups += up_bias;
  const f32x16 active = GATED ? activate(gates + gate_bias, c.activation) * ups : activate(ups, c.activation);
  for (int t = 0; t < N; t++) h[t] = weight[t] * active[t];
  add<W, N>(own, next, h, y, c.d_model);
}

template <class W, bool GATED> static inline Neuron<W> at(const Call &c, int64_t p) {
  return {GATED ? (const W *)c.gate + p * c.gate_stride : nullptr, (const W *)c.up + p * c.up_stride,
          (const W *)c.down + p * c.down_stride};
}

// Neurons rows[begin, end) of all tokens that want them, added to y [T, D].
template <class W, bool GATED>
static void neurons(const Call &c, const float *x, const float *w, const int32_t *rows, int64_t begin, int64_t end,
                    float *y) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t p = rows[i];
    const Neuron<W> own = at<W, GATED>(c, p), next = at<W, GATED>(c, rows[i + 1 < end ? i + 1 : i]);
    for (int64_t t = 0; t < c.tokens;) {
      const float *xs[BLOCK];
      float *ys[BLOCK], weight[BLOCK];
      int n = 0;
      for (; t < c.tokens && n < BLOCK; t++) {
        if (w[t * c.neurons + p] == 0) continue;
        xs[n] = x + t * c.d_model, ys[n] = y + t * c.d_model, weight[n++] = w[t * c.neurons + p];
      }
      if (n == 1) neuron<W, 1, GATED>(c, p, own, next, xs, weight, ys);
      if (n == 2) neuron<W, 2, GATED>(c, p, own, next, xs, weight, ys);
      if (n == 3) neuron<W, 3, GATED>(c, p, own, next, xs, weight, ys);
      if (n == 4) neuron<W, 4, GATED>(c, p, own, next, xs, weight, ys);
    }
  }
}

// Weights of all neurons for all tokens, w[t][p], of which 0 is not wanted. Every index is checked here.
static int weigh(const Call &c, float *w) {
  const int64_t own = c.neurons - c.shared, experts = c.chosen ? c.top_k : c.member ? c.experts : 0;
  for (int64_t t = 0; t < c.tokens; t++) {
    float *row = w + t * c.neurons, *routed = row + c.shared;
    for (int64_t p = 0; p < c.neurons; p++) row[p] = p < c.shared || (!c.chosen && !c.member);
    for (int64_t k = 0; k < experts; k++) {
      const int64_t e = c.chosen ? c.chosen[t * c.top_k + k] : k;
      if (e < 0 || e >= c.experts) return BAD_EXPERT;
      const float weight = c.chosen_weight ? c.chosen_weight[t * c.top_k + k] : 1;
      if (c.member) {
        const uint8_t *has = c.member + e * own;
        for (int64_t p = 0; p < own; p++) routed[p] += has[p] ? weight : 0;
      } else {
        const int64_t begin = e * c.expert_width, end = begin + c.expert_width;
        if (end > own) return BAD_EXPERT;
        for (int64_t p = begin; p < end; p++) routed[p] += weight;
      }
    }
  }
  return OK;
}

// How many tokens want each neuron, and the neurons that any wants; their number.
static int64_t wanted(const Call &c, const float *w, int32_t *tokens, int32_t *rows) {
  memset(tokens, 0, c.neurons * sizeof(int32_t));
  for (int64_t t = 0; t < c.tokens; t++)
    for (int64_t p = 0; p < c.neurons; p++) tokens[p] += w[t * c.neurons + p] != 0;
  int64_t count = 0;
  for (int64_t p = 0; p < c.neurons; p++) {
    rows[count] = (int32_t)p;
    count += tokens[p] != 0;
  }
  return count;
}

struct Team { int me, size; };
static inline Team team() {
#ifdef _OPENMP
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {0, 1};
#endif
}

template <class W> static void widen(const Call &c, float *x) {
  for (int64_t i = 0; i < c.tokens * c.d_model; i++) x[i] = one((const W *)c.x + i);
}

// Each thread sums an equal part of the rows. The parts are added in their order, so that a result can be repeated.
template <class W>
static void compute(const Call &c, const float *w, const int32_t *rows, int64_t count, const float *x, float *parts,
                    Team own) {
  const int64_t size = c.tokens * c.d_model, begin = count * own.me / own.size, end = count * (own.me + 1) / own.size;
  float *part = parts + own.me * size;
  memset(part, 0, size * sizeof(float));
  if (c.gate) neurons<W, true>(c, x, w, rows, begin, end, part);
  else neurons<W, false>(c, x, w, rows, begin, end, part);
#pragma omp barrier
  for (int64_t i = size * own.me / own.size; i < size * (own.me + 1) / own.size; i++) {
    float total = parts[i];
    for (int other = 1; other < own.size; other++) total += parts[other * size + i];
    narrow(total, (W *)c.y + i);
  }
}

extern "C" int moesaic_rows(const Call *call) {
  const Call &c = *call;
  if (c.activation < SILU || c.activation > RELU_SQUARED) return UNKNOWN_ACTIVATION;
  const int64_t size = c.tokens * c.d_model, most = c.threads < 1 ? 1 : c.threads;
  float *memory = (float *)malloc(sizeof(float) * ((1 + most) * size + (c.tokens + 2) * c.neurons));
  if (!memory) return NO_MEMORY;
  float *x = memory, *parts = x + size, *w = parts + most * size;
  int32_t *rows = (int32_t *)(w + c.tokens * c.neurons);
  const int failed = weigh(c, w);
  if (!failed) {
    const int64_t count = wanted(c, w, rows + c.neurons, rows), useful = count / SHARE + 1;
    const int threads = (int)(most < useful ? most : useful);
    widen<WEIGHT>(c, x);
#pragma omp parallel num_threads(threads) if (threads > 1)
    compute<WEIGHT>(c, w, rows, count, x, parts, team());
  }
  free(memory);
  return failed;
}

// Asks for large pages where rows will lie: rows here and there miss the TLB often. It is only a wish.
extern "C" void moesaic_large_pages(void *begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4095, first = ((uintptr_t)begin + page) & ~page, last = ((uintptr_t)begin + bytes) & ~page;
  if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}
"""

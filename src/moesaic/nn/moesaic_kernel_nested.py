"""The `moesaic` architecture: the C++ source of its CPU kernel for neuron experts in int8 (see `moesaic_kernel.py`).

It goes on where `moesaic_kernel_neurons.py` ends. Scores come from the high halves of gate and up. What is read of a
chosen neuron are the low halves and its column of down: its products are those of the scores, and what the low halves
add, so that no half is read twice.
"""

NESTED = r"""
// A neuron in rest: low halves of gate (if there is one) and of up, each s.row_bytes, then 64 groups of bytes of down.
// With q + 128 = 16 high + low, q = (16 high - 120) + (low - 8): what scores know, and what is left.
static const float HIGH = -7.5f, LOW = -8;
static const int TOGETHER = 16;  // neurons that are activated together, and added to y in one pass over it

typedef int8_t i8x16 __attribute__((vector_size(16)));
static inline f32x16 widened(const int8_t *p) {
  i8x16 v;
  memcpy(&v, p, sizeof v);
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#else
  return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

static inline void fetch_bytes(const uint8_t *p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
}

// Activations of rows[0, count) for N tokens from the t-th on, h[n][i]; 0 where a token does not want the neuron.
template <class W, int N, bool GATED>
static void activations(const Call &c, const LowBit &r, const Shape &s, const Input *in, const int32_t *rows, int count,
                        int ahead, int64_t t, const float *w, const float *dots, float (*h)[TOGETHER]) {
  const int64_t stride = (GATED ? 4 : 3) * s.row_bytes, wide = padded(c.neurons), inner = stride - 2 * s.row_bytes;
  float gate[N][TOGETHER] = {}, up[N][TOGETHER] = {}, weight[N][TOGETHER] = {}, dot[2][N];
  for (int i = 0; i < count; i++) {
    const int64_t p = rows[i];
    const uint8_t *own = r.rest + p * stride;
    fetch_bytes(own + inner, stride - inner);                                // down of this one
    if (i < ahead) fetch_bytes(r.rest + rows[count + i] * stride, inner);    // of one of the next
    const Low low[2] = {{own + inner - s.row_bytes, r.up_scale + p * s.groups, nullptr},
                        {own, GATED ? r.gate_scale + p * s.groups : nullptr, nullptr}};
    product<4, GATED ? 2 : 1, N>(s, low, in + t, dot);
    const float up_bias = c.up_bias ? one((const W *)c.up_bias + p) : 0;
    const float gate_bias = c.gate_bias ? one((const W *)c.gate_bias + p) : 0;
    for (int n = 0; n < N; n++) {
      up[n][i] = dot[0][n] + dots[(t + n) * wide + p] + up_bias;
      if (GATED) gate[n][i] = dot[1][n] + dots[(c.tokens + t + n) * wide + p] + gate_bias;
      weight[n][i] = w[(t + n) * c.neurons + p];
    }
  }
  for (int n = 0; n < N; n++) {
    const f32x16 u = load(up[n]), a = GATED ? activate(load(gate[n]), c.activation) * u : activate(u, c.activation);
    for (int i = 0; i < TOGETHER; i++) h[n][i] = weight[n][i] ? a[i] : 0;
  }
}

// y += sum over the neurons of h times their column of down; y has room for whole groups.
template <bool GATED>
static void add_down(const LowBit &r, const Shape &s, const int32_t *rows, int count, const float *h, float *y) {
  const int64_t stride = (GATED ? 4 : 3) * s.row_bytes, inner = stride - 2 * s.row_bytes;
  const int8_t *down[TOGETHER];
  const bf16 *scale[TOGETHER];
  float own[TOGETHER];
  int n = 0;
  for (int i = 0; i < count; i++) {
    if (h[i] == 0) continue;
    down[n] = (const int8_t *)r.rest + rows[i] * stride + inner, scale[n] = r.rest_scale + rows[i] * s.groups;
    own[n++] = h[i];
  }
  for (int64_t g = 0; g < s.groups; g++) {
    f32x16 total[4];
    UNROLL for (int v = 0; v < 4; v++) total[v] = load(y + 64 * g + 16 * v);
    for (int i = 0; i < n; i++) {
      const f32x16 factor = own[i] * one(scale[i] + g) - (f32x16){};
      UNROLL for (int v = 0; v < 4; v++) total[v] += factor * widened(down[i] + 64 * g + 16 * v);
    }
    memcpy(y + 64 * g, total, sizeof total);
  }
}

template <class W, bool GATED>
static void nested(const Call &c, const LowBit &r, const Shape &s, const Input *in, const float *w, const float *dots,
                   const int32_t *rows, int64_t begin, int64_t end, float *y) {
  for (int64_t i = begin; i < end; i += TOGETHER) {
    const int64_t left = end - i, more = left < TOGETHER ? 0 : left - TOGETHER;
    const int count = left < TOGETHER ? (int)left : TOGETHER, ahead = more < TOGETHER ? (int)more : TOGETHER;
    for (int64_t t = 0; t < c.tokens; t += BLOCK) {
      float h[BLOCK][TOGETHER];
      const int tokens = c.tokens - t < BLOCK ? (int)(c.tokens - t) : BLOCK;
      if (tokens == 1) activations<W, 1, GATED>(c, r, s, in, rows + i, count, ahead, t, w, dots, h);
      else if (tokens == 2) activations<W, 2, GATED>(c, r, s, in, rows + i, count, ahead, t, w, dots, h);
      else if (tokens == 3) activations<W, 3, GATED>(c, r, s, in, rows + i, count, ahead, t, w, dots, h);
      else activations<W, 4, GATED>(c, r, s, in, rows + i, count, ahead, t, w, dots, h);
      for (int n = 0; n < tokens; n++) add_down<GATED>(r, s, rows + i, count, h[n], y + (t + n) * 64 * s.groups);
    }
  }
}

// Codes to weights, of whole matrices: for many tokens, whose products are torch's.
extern "C" {
struct Decode {  // the same fields as Decode in moesaic_kernel.py
  const uint8_t *high, *low;  // packed halves; without low, the middles of high; without high, low has whole bytes
  const void *scale;          // bf16 [rows, groups of 64]
  void *out;                  // [rows, D], float if `single`, else WEIGHT
  int64_t rows, d_model, low_stride, single, threads;  // high has no gaps between its rows
};
}

static inline void store(f32x16 v, float *to) { memcpy(to, &v, sizeof v); }
static inline void store(f32x16 v, bf16 *to) {
  const u32x16 u = (u32x16)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const u16x16 half = __builtin_convertvector(rounded, u16x16);
  memcpy(to, &half, sizeof half);
}
static inline void store(f32x16 v, fp16 *to) {
#ifdef __AVX512F__
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < 16; i++) narrow(v[i], to + i);
#endif
}

template <class W> static void decode(const Decode &c, int64_t begin, int64_t end) {
  typedef uint8_t u8x16 __attribute__((vector_size(16)));
  const int64_t groups = divided(c.d_model, 64);
  for (int64_t p = begin; p < end; p++)
    for (int64_t g = 0; g < groups; g++) {
      const float scale = one((const bf16 *)c.scale + p * groups + g);
      int8_t codes[64];
      for (int half = 0; half < 2 && c.high; half++) {
        u8x16 high, low = 136 - (u8x16){};  // in the middle: 8
        memcpy(&high, c.high + (p * groups + g) * 32 + 16 * half, sizeof high);
        if (c.low) memcpy(&low, c.low + p * c.low_stride + g * 32 + 16 * half, sizeof low);
        const u8x16 first = ((high << 4) | (low & 15)) ^ 128, second = ((high & 240) | (low >> 4)) ^ 128;
        memcpy(codes + 32 * half, &first, sizeof first), memcpy(codes + 32 * half + 16, &second, sizeof second);
      }
      if (!c.high) memcpy(codes, c.low + p * c.low_stride + g * 64, sizeof codes);
      const int64_t left = c.d_model - 64 * g;
      W *to = (W *)c.out + p * c.d_model + 64 * g, last[64];
      UNROLL for (int v = 0; v < 4; v++) store(scale * widened(codes + 16 * v), (left < 64 ? last : to) + 16 * v);
      if (left < 64) memcpy(to, last, left * sizeof(W));
    }
}

extern "C" int moesaic_decode(const Decode *call) {
  const Decode &c = *call;
  const int64_t useful = c.rows / SHARE + 1;
  const int threads = (int)(c.threads < 1 ? 1 : c.threads < useful ? c.threads : useful);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team own = team();
    const int64_t begin = c.rows * own.me / own.size, end = c.rows * (own.me + 1) / own.size;
    if (c.single) decode<float>(c, begin, end);
    else decode<WEIGHT>(c, begin, end);
  }
  return OK;
}

extern "C" int moesaic_nested(const Call *call, const LowBit *router) {
  const Call &c = *call;
  const LowBit &r = *router;
  if (c.activation < SILU || c.activation > RELU_SQUARED) return UNKNOWN_ACTIVATION;
  if (r.bits != 4 || r.group != 64) return BAD_ROUTER;
  if (!r.threshold && (c.top_k < 1 || c.top_k > c.neurons)) return BAD_TOP_K;
  const int64_t groups = divided(c.d_model, 64), wide = padded(c.neurons), useful = c.neurons / SHARE + 1;
  const Shape high = {c.d_model, groups, 64, 32 * groups, HIGH}, low = {c.d_model, groups, 64, 32 * groups, LOW};
  const int64_t size = padded(c.tokens * c.d_model), part = c.tokens * 64 * groups;
  const int threads = (int)(c.threads < 1 ? 1 : c.threads < useful ? c.threads : useful);
  const int64_t floats = size + threads * part + c.tokens * (4 * wide + input_bytes(high) / 4) + 2 * wide;
  void *memory = malloc(4 * floats + 64);
  Input *in = (Input *)malloc(sizeof(Input) * c.tokens);
  if (!memory || !in) {
    free(memory), free(in);
    return NO_MEMORY;
  }
  float *x = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), *parts = x + size, *e = parts + threads * part;
  float *dots = e + c.tokens * wide, *w = dots + 2 * c.tokens * wide;
  int32_t *rows = (int32_t *)(w + c.tokens * wide), *tokens = rows + wide;
  widen<WEIGHT>(c, x);
  inputs(c, high, x, (char *)(tokens + wide), in);
  int64_t count = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team own = team();
    scores<WEIGHT, 4>(c, r, high, in, own, e, dots);
#pragma omp barrier
    choose(c, r, own, e, w);
#pragma omp barrier
#pragma omp master
    count = wanted(c, w, tokens, rows);
#pragma omp barrier
    const int64_t begin = count * own.me / own.size, end = count * (own.me + 1) / own.size;
    float *y = parts + own.me * part;
    memset(y, 0, part * sizeof *y);
    if (c.gate) nested<WEIGHT, true>(c, r, low, in, w, dots, rows, begin, end, y);
    else nested<WEIGHT, false>(c, r, low, in, w, dots, rows, begin, end, y);
#pragma omp barrier
    const int64_t outputs = c.tokens * c.d_model;
    for (int64_t i = outputs * own.me / own.size; i < outputs * (own.me + 1) / own.size; i++) {
      const int64_t at = i / c.d_model * 64 * groups + i % c.d_model;
      float total = parts[at];
      for (int other = 1; other < own.size; other++) total += parts[other * part + at];
      narrow(total, (WEIGHT *)c.y + i);
    }
  }
  free(memory), free(in);
  return OK;
}
"""

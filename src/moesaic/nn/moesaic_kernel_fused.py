"""The `moesaic` architecture: the C++ source of what stands between two products (see `moesaic_path_fused.py`).

It stands behind that of `moesaic_kernel_source.py`, whose types and functions it uses.
"""

FUSED = r"""
// h = w * act(gate + b) * (up + b') in one pass, where torch takes one for each operation. Sums are fp32.
// Products lie by tokens, [T, M], or by neurons, [M, T]. What comes out lies by tokens.
extern "C" {
struct Fused {  // the same fields as Fused in moesaic_kernel.py
  const void *gate, *up, *gate_bias, *up_bias;  // gate and biases may be null
  const void *weight;          // of a token for a group of `width` neurons, in the order of the products; or null
  const int64_t *chosen;       // [T, K], of products by tokens; or null
  const float *chosen_weight;  // [T, K]; null: 1
  const uint8_t *member;       // [E, M - plain], where `chosen` is
  void *h;                     // [T, M]; may be `up` where that lies by tokens
  int64_t tokens, neurons, by_neurons;
  int64_t plain, width, stride;  // neurons before the first that has a weight; elements from a line of weights or
                                 // members to the next
  int64_t experts, top_k, activation, threads;
};
}

static const int SQUARE = 32;            // neurons and tokens that are turned at a time: a line of the cache in bf16
static const int64_t CHUNK = 1024;       // neurons of one token that a thread takes at a time
static const int64_t WORTH = 1 << 14;    // elements for which a thread more is worth while

static inline void narrow(f32x16 v, float *out) { memcpy(out, &v, sizeof v); }
#ifdef __AVX512F__
static inline void narrow(f32x16 v, fp16 *out) {
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  memcpy(out, &half, sizeof half);
}
#else
static inline void narrow(f32x16 v, fp16 *out) { for (int i = 0; i < 16; i++) narrow(v[i], out + i); }
#endif
static inline void narrow(f32x16 v, bf16 *out) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(out, &half, sizeof half);
#else
  const u32x16 u = (u32x16)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u32x16)(v != v);
  const u16x16 half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), u16x16);
  memcpy(out, &half, sizeof half);
#endif
}

// Rows become columns: 16 vectors of tokens are 16 vectors of neurons afterwards.
static inline void turn(f32x16 *v) {
#ifdef __AVX512F__
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  UNROLLED for (int side = 8; side; side /= 2) {
    const i32x16 second = (lane & side) != 0;
    const i32x16 low = (second & ((lane - side) | 16)) | (~second & lane);
    const i32x16 high = (second & (lane | 16)) | (~second & (lane + side));
    UNROLLED for (int i = 0; i < 16; i++) if (!(i & side)) {
      const __m512 a = (__m512)v[i], b = (__m512)v[i + side];
      v[i] = (f32x16)_mm512_permutex2var_ps(a, (__m512i)low, b);
      v[i + side] = (f32x16)_mm512_permutex2var_ps(a, (__m512i)high, b);
    }
  }
#else
  float square[16][16];
  memcpy(square, v, sizeof square);
  for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) v[i][j] = square[j][i];
#endif
}

// Up to 16 elements; what is missing is 0.
template <class W> static inline f32x16 some(const W *p, int64_t count) {
  if (count >= 16) return load(p);
  f32x16 v = {};
  for (int i = 0; i < count; i++) v[i] = one(p + i);
  return v;
}
template <class W> static inline void put(f32x16 v, W *out, int64_t count) {
  if (count >= 16) narrow(v, out);
  else for (int i = 0; i < count; i++) narrow(v[i], out + i);
}

static inline f32x16 active(const Fused &c, f32x16 gate, f32x16 up) {
  return c.gate ? activate(gate, c.activation) * up : activate(up, c.activation);
}

// What is not wanted may be infinite.
static inline f32x16 times(f32x16 h, f32x16 weight) { return weight == 0 ? (f32x16){} : h * weight; }

// Weights of up to 16 neurons from p on, for token t; products by tokens.
template <class W> static inline f32x16 weights(const Fused &c, int64_t t, int64_t p, int64_t count) {
  const W *own = (const W *)c.weight + t * c.stride;
  if (p >= c.plain) {
    const int64_t from = p - c.plain;
    if (c.width == 1) return some(own + from, count);
    if (from / c.width == (from + count - 1) / c.width) return one(own + from / c.width) - (f32x16){};
  }
  f32x16 v = 1.0f - (f32x16){};
  for (int i = 0; i < count; i++) if (p + i >= c.plain) v[i] = one(own + (p + i - c.plain) / c.width);
  return v;
}

// The same by membership: what the weights of a token's experts that have a neuron add up to.
static inline f32x16 weights_of_members(const Fused &c, int64_t t, int64_t p, int64_t count) {
  f32x16 v = {};
  const int64_t from = p - c.plain, *chosen = c.chosen + t * c.top_k;
  for (int64_t k = 0; k < c.top_k; k++) {
    const uint8_t *has = c.member + chosen[k] * c.stride + from;
    const float weight = c.chosen_weight ? c.chosen_weight[t * c.top_k + k] : 1;
    if (from >= 0 && count >= 16) {
      typedef uint8_t u8x16 __attribute__((vector_size(16)));
      u8x16 own;
      memcpy(&own, has, sizeof own);
      v += __builtin_convertvector(__builtin_convertvector(own, u32x16), f32x16) * weight;
    } else {
      for (int i = 0; i < count && i < 16; i++) v[i] += from + i < 0 ? k == 0 : has[i] ? weight : 0;
    }
  }
  return v;
}

template <class W> static void by_tokens(const Fused &c, int64_t t, int64_t begin, int64_t end) {
  const int64_t line = t * c.neurons;
  for (int64_t p = begin; p < end; p += 16) {
    const int64_t count = end - p;
    f32x16 up = some((const W *)c.up + line + p, count), gate = up;
    if (c.gate) gate = some((const W *)c.gate + line + p, count);
    if (c.gate_bias) gate += some((const W *)c.gate_bias + p, count);
    if (c.up_bias) up += some((const W *)c.up_bias + p, count);
    f32x16 h = active(c, gate, up);
    if (c.weight && end > c.plain) h = times(h, weights<W>(c, t, p, count < 16 ? count : 16));
    if (c.chosen && p + 16 > c.plain) h = times(h, weights_of_members(c, t, p, count));
    put(h, (W *)c.h + line + p, count);
  }
}

template <class W> static void by_neurons(const Fused &c, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < c.tokens; t += 16) {
    const int64_t tokens = c.tokens - t;
    for (int64_t first = begin; first < end; first += 16) {
      f32x16 h[16] = {};
      UNROLLED for (int i = 0; i < 16; i++) if (first + i < end) {
        const int64_t p = first + i, line = p * c.tokens + t;
        f32x16 up = some((const W *)c.up + line, tokens), gate = up;
        if (c.gate) gate = some((const W *)c.gate + line, tokens);
        if (c.gate_bias) gate += one((const W *)c.gate_bias + p);
        if (c.up_bias) up += one((const W *)c.up_bias + p);
        h[i] = active(c, gate, up);
        if (c.weight && p >= c.plain)
          h[i] = times(h[i], some((const W *)c.weight + (p - c.plain) / c.width * c.stride + t, tokens));
      }
      turn(h);
      UNROLLED for (int i = 0; i < 16; i++)
        if (i < tokens) put(h[i], (W *)c.h + (t + i) * c.neurons + first, end - first);
    }
  }
}

extern "C" int moesaic_fused(const Fused *fused) {
  const Fused &c = *fused;
  if (c.activation < SILU || c.activation > RELU_SQUARED) return UNKNOWN_ACTIVATION;
  for (int64_t i = 0; c.chosen && i < c.tokens * c.top_k; i++)
    if (c.chosen[i] < 0 || c.chosen[i] >= c.experts) return BAD_EXPERT;
  const int64_t size = c.by_neurons ? SQUARE : CHUNK, parts = (c.neurons + size - 1) / size;
  const int64_t all = c.by_neurons ? parts : parts * c.tokens, useful = c.tokens * c.neurons / WORTH + 1;
  const int64_t most = c.threads < 1 ? 1 : c.threads;
#pragma omp parallel for schedule(static) num_threads((int)(most < useful ? most : useful)) if (most > 1 && useful > 1)
  for (int64_t i = 0; i < all; i++) {
    const int64_t part = c.by_neurons ? i : i % parts, end = (part + 1) * size;
    if (c.by_neurons) by_neurons<WEIGHT>(c, part * size, end < c.neurons ? end : c.neurons);
    else by_tokens<WEIGHT>(c, i / parts, part * size, end < c.neurons ? end : c.neurons);
  }
  return OK;
}
"""

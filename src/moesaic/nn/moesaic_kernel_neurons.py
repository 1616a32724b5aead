"""The `moesaic` architecture: the C++ source of its CPU kernel for neuron experts (see `moesaic_kernel.py`).

It goes on where `moesaic_kernel_source.py` ends, and uses what stands there. Every neuron is an expert; the router is
a copy of gate and up in 4, 3 or 2 bits per weight. `PORTABLE` forces the form for CPUs without AVX-512's integers.
"""

NEURONS = r"""
// Packed codes, per row in blocks of 64 weights w (the rest of the last block is padding with code 0):
//   4 bits, 32 bytes: byte 16h + j has weight 32h + j in its low and 32h + 16 + j in its high nibble;
//   3 bits, 24 bytes: bits 2i and 2i + 1 of byte j are the low bits of weight 16i + j; bit k of byte 16 + m is the
//     third bit of weight 8m + k;
//   2 bits, 16 bytes: as the first 16 of 3 bits.
// A weight is scale * code + offset of its group along D. Axis: G groups.
extern "C" {
struct LowBit {  // the same fields as LowBit in moesaic_kernel.py
  const uint8_t *gate_codes, *up_codes;                             // [P, bytes]; those of the gate may be null
  const bf16 *gate_scale, *gate_offset, *up_scale, *up_offset;      // [P, G]
  const float *norm;                                                // [P]
  const float *threshold;                                           // [1]; null: the top_k largest
  const uint8_t *rest;                                              // of int8, see below; then there are no offsets
  const bf16 *rest_scale;
  float *scores;                                                    // [T, P], what was found, or null
  uint8_t *taken;                                                   // [T, P], which were chosen, or null
  int64_t bits, group;
};
}

enum { BAD_ROUTER = 4, BAD_TOP_K = 5 };
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && !defined(PORTABLE)
#define INTEGERS
#endif

static inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded(int64_t a) { return divided(a, 16) * 16; }

typedef int32_t i32x16 __attribute__((vector_size(64)));
static inline i32x16 ints(const float *p) { i32x16 v; memcpy(&v, p, sizeof v); return v; }
static inline f32x16 magnitude(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }

struct Low { const uint8_t *codes; const bf16 *scale, *offset; };  // of one row
struct Shape {
  int64_t d, groups, group, row_bytes;
  float middle;  // the offset in scales, where no other is given
};

static inline f32x16 first(const bf16 *p, int64_t count) {  // the rest is 0
#ifdef __AVX512BW__
  const __mmask16 have = count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff;
  return (f32x16)(__m512i)((u32x16)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(have, p)) << 16);
#else
  if (count >= 16) return load(p);
  bf16 own[16] = {};
  memcpy(own, p, count * sizeof *p);
  return load(own);
#endif
}

#ifdef INTEGERS
// A token's x in units of 128 weights: integers times a power of two per 32 weights, as signed bytes from the highest
// to the lowest, so that 64 products of a code and a byte are one instruction. Sums within 32 weights are exact. What
// is cut off x is at most 2^-22 of the largest |x| of its 32. For x in bf16, which has 8 bits, two bytes do: at most
// 2^-14, and nothing of those above 2^-6 of the largest.
static constexpr int bytes_for(const bf16 *) { return 2; }
static constexpr int bytes_for(const void *) { return 3; }
static const int BYTES = bytes_for((const WEIGHT *)nullptr);
struct Planes { __m512i byte[BYTES][2]; };  // in the order of Codes
struct Input { const Planes *planes; const float *scale, *sums; };  // 16 scales per unit, sum of x per group
struct Codes { __m512i part[2]; };  // 128 codes: lane l of 16 bytes has weights 32l + j in part 0, 32l + 16 + j in 1

// A multiple of 64.
static inline int64_t input_bytes(const Shape &s) {
  const int64_t units = divided(s.d, 128);
  return units * (int64_t)sizeof(Planes) + 4 * (16 * units + padded(s.groups));
}

static void prepare(const Shape &s, const float *x, char *memory, Input *in) {
  const int64_t units = divided(s.d, 128);
  Planes *planes = (Planes *)memory;
  float *scale = (float *)(planes + units);
  memset(planes, 0, units * sizeof *planes);
  for (int64_t part = 0; part < 4 * units; part++) {
    float own[32] = {}, most = 0;
    const int64_t left = s.d - 32 * part, count = left < 0 ? 0 : left < 32 ? left : 32;
    if (count) memcpy(own, x + 32 * part, count * sizeof *own);
    int finite = 1, exponent = 0;
    for (int i = 0; i < 32; i++) {
      const float size = fabsf(own[i]);
      finite &= size <= 3.4028234e38f;
      most = size > most ? size : most;
    }
    const int some = finite && most > 1e-30f;
    const float mantissa = frexpf(some ? most : 1, &exponent);
    exponent -= 8 * BYTES - (mantissa < 0.992f ? 1 : 2);
    for (int i = 0; i < 4; i++) scale[4 * part + i] = finite ? ldexpf(1, exponent) : NAN;
    const float inverse = ldexpf(1, -exponent);
    int8_t *bytes = (int8_t *)(planes + part / 4) + 16 * (part % 4);
    for (int i = 0; i < 32 && some; i++) {
      int32_t q = (int32_t)rintf(own[i] * inverse);
      for (int byte = BYTES - 1; byte >= 0; byte--) {
        bytes[128 * byte + 64 * (i / 16) + i % 16] = (int8_t)(uint8_t)q;  // from 128 on, one below 0, and a carry
        q = (q + 128) >> 8;
      }
    }
  }
  in->planes = planes, in->scale = scale;
}

template <int BITS> static inline Codes unpack(const uint8_t *p, __mmask64 have) {
  const __m512i v = _mm512_maskz_loadu_epi8(have, p);
  if (BITS == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    return {{_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble)}};
  }
  // Blocks A and B: lanes A A B B, of which part 0 takes bits 0 and 1, or 4 and 5, and part 1 those beside them.
  const int64_t b = BITS;  // 8-byte words of a block
  const __m512i two = _mm512_set1_epi8(3), to_part[2] = {_mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0),
                                                          _mm512_set_epi64(6, 6, 2, 2, 6, 6, 2, 2)};
  const __m512i twice = _mm512_permutexvar_epi64(_mm512_set_epi64(b + 1, b, b + 1, b, 1, 0, 1, 0), v);
  Codes codes;
  for (int part = 0; part < 2; part++)
    codes.part[part] = _mm512_and_si512(_mm512_srlv_epi64(twice, to_part[part]), two);
  if (BITS == 3) {
    // Each 8 bytes of a part take the 8 third bits of theirs: a byte spread by a shuffle, one bit of it tested.
    const __m512i bit = _mm512_set1_epi64((int64_t)0x8040201008040201), four = _mm512_set1_epi8(4);
    for (int part = 0; part < 2; part++) {
      const int64_t m = 2 * part, one = 0x0101010101010101;
      const __m512i place = _mm512_set_epi64((45 + m) * one, (44 + m) * one, (41 + m) * one, (40 + m) * one,
                                             (21 + m) * one, (20 + m) * one, (17 + m) * one, (16 + m) * one);
      const __mmask64 third = _mm512_test_epi8_mask(_mm512_permutexvar_epi8(place, v), bit);
      codes.part[part] = _mm512_mask_add_epi8(codes.part[part], third, codes.part[part], four);
    }
  }
  return codes;
}

// R rows of the router times x of N tokens, out[r][n].
template <int BITS, int R, int N>
static inline void product(const Shape &s, const Low *row, const Input *in, float (*out)[N]) {
  // Which of the 16 scales at hand each of the 16 sums of a unit takes: weight 32l + j is in lane l.
  const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m128i shift = _mm_cvtsi32_si128(s.group == 32 ? 0 : s.group == 64 ? 1 : 2);
  f32x16 total[R][N] = {};
  const int64_t units = divided(s.d, 128), many = s.group / 8;  // units of 16 groups
  const int64_t whole = s.row_bytes / (16 * BITS);              // the others have 64 weights
  const __mmask64 all_of = ~(uint64_t)0 >> (64 - 16 * BITS);
  for (int64_t g = 0, u = 0; g < s.groups; g += 16) {
    __m512 scale[R];
    UNROLL for (int r = 0; r < R; r++) {
      scale[r] = (__m512)first(row[r].scale + g, s.groups - g);
      const f32x16 offset = row[r].offset ? first(row[r].offset + g, s.groups - g) : (f32x16)scale[r] * s.middle;
      UNROLL for (int n = 0; n < N; n++) total[r][n] += offset * load(in[n].sums + g);
    }
    __m512i at = lane;
    const auto add = [&](__mmask64 have) {
      const __m512i of_group = _mm512_srl_epi32(at, shift);
      UNROLL for (int r = 0; r < R; r++) {
        const Codes codes = unpack<BITS>(row[r].codes + 16 * BITS * u, have);
        const f32x16 scales = (f32x16)_mm512_permutexvar_ps(of_group, scale[r]);
        UNROLL for (int n = 0; n < N; n++) {
          const Planes &x = in[n].planes[u];
          __m512i sum = _mm512_setzero_si512();
          UNROLL for (int i = 0; i < BYTES; i++) {
            sum = _mm512_dpbusd_epi32(i ? _mm512_slli_epi32(sum, 8) : sum, codes.part[0], x.byte[i][0]);
            sum = _mm512_dpbusd_epi32(sum, codes.part[1], x.byte[i][1]);
          }
          total[r][n] += (f32x16)_mm512_cvtepi32_ps(sum) * (scales * load(in[n].scale + 16 * u));
        }
      }
      at = _mm512_add_epi32(at, _mm512_set1_epi32(4));
    };
    for (const int64_t stop = u + many < whole ? u + many : whole; u < stop; u++) add(all_of);
    if (u == whole && whole < units && g + 16 >= s.groups) add(all_of >> 8 * BITS), u++;  // the half at the end
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) out[r][n] = sum(total[r][n]);
}
#else
struct Input { const float *x, *sums; };  // x padded with 0 to a multiple of 32

// A multiple of 64.
static inline int64_t input_bytes(const Shape &s) {
  return 4 * (2 * padded(divided(s.d, 2)) + padded(s.groups));
}

static void prepare(const Shape &s, const float *x, char *memory, Input *in) {
  memset(memory, 0, input_bytes(s));
  memcpy(memory, x, s.d * sizeof *x);
  in->x = (const float *)memory;
}

typedef uint8_t u8x16 __attribute__((vector_size(16)));
struct Codes { f32x16 part[2]; };  // 32 codes

template <int BITS> static inline Codes unpack(const uint8_t *row, int64_t half) {
  u8x16 v;
  const uint8_t *block = row + half / 2 * 8 * BITS;
  const int within = half % 2;
  memcpy(&v, BITS == 4 ? block + 16 * within : block, sizeof v);
  u8x16 part[2] = {v & 15, v >> 4};
  if (BITS != 4) part[0] = v >> (4 * within) & 3, part[1] = v >> (4 * within + 2) & 3;
  Codes codes;
  for (int i = 0; i < 2; i++) {
    u32x16 code = __builtin_convertvector(part[i], u32x16);
    if (BITS == 3) {
      const uint8_t *third = block + 16 + 4 * within + 2 * i;
      const u32x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
      code += (u32x16)((bit & (uint32_t)(third[0] | third[1] << 8)) != 0) & 4;
    }
    codes.part[i] = __builtin_convertvector((i32x16)code, f32x16);
  }
  return codes;
}

// R rows of the router times x of N tokens, out[r][n].
template <int BITS, int R, int N>
static inline void product(const Shape &s, const Low *row, const Input *in, float (*out)[N]) {
  f32x16 total[R][N] = {};
  float rest[R][N] = {};
  const int64_t halves = divided(s.d, 32), many = s.group / 32;
  for (int64_t g = 0, half = 0; g < s.groups; g++) {
    f32x16 own[R][N] = {};
    for (const int64_t stop = half + many < halves ? half + many : halves; half < stop; half++)
      UNROLL for (int r = 0; r < R; r++) {
        const Codes codes = unpack<BITS>(row[r].codes, half);
        UNROLL for (int i = 0; i < 2; i++)
          UNROLL for (int n = 0; n < N; n++) own[r][n] += codes.part[i] * load(in[n].x + 32 * half + 16 * i);
      }
    UNROLL for (int r = 0; r < R; r++) {
      const float scale = one(row[r].scale + g), offset = row[r].offset ? one(row[r].offset + g) : scale * s.middle;
      UNROLL for (int n = 0; n < N; n++) total[r][n] += scale * own[r][n], rest[r][n] += offset * in[n].sums[g];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) out[r][n] = sum(total[r][n]) + rest[r][n];
}
#endif

static void inputs(const Call &c, const Shape &s, const float *x, char *memory, Input *in) {
  for (int64_t t = 0; t < c.tokens; t++, memory += input_bytes(s)) {
    prepare(s, x + t * s.d, memory, in + t);
    float *sums = (float *)(memory + input_bytes(s)) - padded(s.groups);
    for (int64_t g = 0; g < padded(s.groups); g++) {
      sums[g] = 0;
      const int64_t end = (g + 1) * s.group < s.d ? (g + 1) * s.group : s.d;
      for (int64_t i = g * s.group; i < end; i++) sums[g] += x[t * s.d + i];
    }
    in[t].sums = sums;
  }
}

// Scores of neurons [begin, end), at most 16, for N tokens; e[t][p]. Where there is room for them, products without
// biases as well: dots[t][p] of up, and behind those of all tokens, of gate.
template <class W, int BITS, int N, bool GATED>
static void score(const Call &c, const LowBit &r, const Shape &s, const Input *in, int64_t begin, int64_t end,
                  float *e, float *dots) {
  const float times = r.rest ? 16 : 1;
  float gate[N][16] = {}, up[N][16] = {}, norm[16] = {}, dot[2][N];
  for (int64_t p = begin; p < end; p++) {
    const int64_t i = p - begin, at = p * s.row_bytes, g = p * s.groups;
    const auto offset = [&](const bf16 *all) { return all ? all + g : nullptr; };
    const Low rows[2] = {{r.up_codes + at, r.up_scale + g, offset(r.up_offset)},
                         {GATED ? r.gate_codes + at : nullptr, r.gate_scale + g, offset(r.gate_offset)}};
    product<BITS, GATED ? 2 : 1, N>(s, rows, in, dot);
    for (int n = 0; n < N && dots; n++)
      for (int side = 0; side <= GATED; side++)
        dots[(side * c.tokens + n) * padded(c.neurons) + p] = dot[side][n] *= times;
    const float up_bias = c.up_bias ? one((const W *)c.up_bias + p) : 0;
    const float gate_bias = c.gate_bias ? one((const W *)c.gate_bias + p) : 0;
    norm[i] = r.norm[p];
    for (int n = 0; n < N; n++) up[n][i] = dot[0][n] + up_bias;
    for (int n = 0; n < N && GATED; n++) gate[n][i] = dot[1][n] + gate_bias;
  }
  for (int n = 0; n < N; n++) {
    const f32x16 u = load(up[n]), h = GATED ? activate(load(gate[n]), c.activation) * u : activate(u, c.activation);
    const f32x16 own = magnitude(h) * load(norm);
    memcpy(e + n * padded(c.neurons) + begin, &own, sizeof own);
  }
}

template <class W, int BITS, bool GATED>
static void scores(const Call &c, const LowBit &r, const Shape &s, const Input *in, Team own, float *e, float *dots) {
  const int64_t blocks = divided(c.neurons, 16), wide = padded(c.neurons);
  for (int64_t b = blocks * own.me / own.size; b < blocks * (own.me + 1) / own.size; b++) {
    const int64_t begin = 16 * b, end = begin + 16 < c.neurons ? begin + 16 : c.neurons;
    for (int64_t t = 0; t < c.tokens; t += BLOCK) {
      float *to = e + t * wide, *own_dots = dots ? dots + t * wide : nullptr;
      if (c.tokens - t == 1) score<W, BITS, 1, GATED>(c, r, s, in + t, begin, end, to, own_dots);
      else if (c.tokens - t == 2) score<W, BITS, 2, GATED>(c, r, s, in + t, begin, end, to, own_dots);
      else if (c.tokens - t == 3) score<W, BITS, 3, GATED>(c, r, s, in + t, begin, end, to, own_dots);
      else score<W, BITS, 4, GATED>(c, r, s, in + t, begin, end, to, own_dots);
    }
  }
}

template <class W, int BITS>
static void scores(const Call &c, const LowBit &r, const Shape &s, const Input *in, Team own, float *e,
                   float *dots = nullptr) {
  if (c.gate) scores<W, BITS, true>(c, r, s, in, own, e, dots);
  else scores<W, BITS, false>(c, r, s, in, own, e, dots);
}

static int64_t above(const float *e, int64_t count, int32_t limit) {
  i32x16 found = {};
  for (int64_t i = 0; i < count; i += 16) found -= (i32x16)(ints(e + i) > limit);
  int64_t total = 0;
  for (int i = 0; i < 16; i++) total += found[i];
  return total;
}

// w[p] = 1 for the k largest of count scores (of equal ones the first), else 0. Scores are not negative, so that their
// bits are in their order: those of the k-th largest are found from the top. e has room for a multiple of 16.
static void largest(float *e, int64_t count, int64_t k, float *w) {
  for (int64_t i = count; i < padded(count); i++) e[i] = -1;
  int32_t limit = 0;
  int64_t found = count;
  for (int bit = 30; bit >= 0 && found != k; bit--) {
    const int32_t higher = limit | 1 << bit;
    const int64_t more = above(e, padded(count), higher - 1);
    if (more >= k) limit = higher, found = more;
  }
  int64_t equal = k - above(e, padded(count), limit);
  for (int64_t i = 0; i < count; i++) {
    const int32_t own = (int32_t)as_bits(e[i]);
    w[i] = own > limit || (own == limit && equal-- > 0);
  }
}

// What a thread's share of the tokens choose: w[t][p] is 1, or 0.
static void choose(const Call &c, const LowBit &r, Team own, float *e, float *w) {
  for (int64_t t = own.me; t < c.tokens; t += own.size) {
    float *score = e + t * padded(c.neurons), *chosen = w + t * c.neurons;
    if (!r.threshold) largest(score, c.neurons, c.top_k, chosen);
    else
      for (int64_t p = 0; p < c.neurons; p++) chosen[p] = score[p] >= *r.threshold;
    if (r.scores) memcpy(r.scores + t * c.neurons, score, c.neurons * sizeof *score);
    if (r.taken)
      for (int64_t p = 0; p < c.neurons; p++) r.taken[t * c.neurons + p] = chosen[p] != 0;
  }
}

extern "C" int moesaic_neurons(const Call *call, const LowBit *router) {
  const Call &c = *call;
  const LowBit &r = *router;
  if (c.activation < SILU || c.activation > RELU_SQUARED) return UNKNOWN_ACTIVATION;
  if (r.bits < 2 || r.bits > 4 || (r.group != 32 && r.group != 64 && r.group != 128)) return BAD_ROUTER;
  if (!r.threshold && (c.top_k < 1 || c.top_k > c.neurons)) return BAD_TOP_K;
  const Shape s = {c.d_model, divided(c.d_model, r.group), r.group, divided(c.d_model, 64) * 8 * r.bits, 0};
  const int64_t size = padded(c.tokens * c.d_model), useful = c.neurons / SHARE + 1, wide = padded(c.neurons);
  const int threads = (int)(c.threads < 1 ? 1 : c.threads < useful ? c.threads : useful);
  const int64_t floats = (1 + threads) * size + c.tokens * (2 * wide + input_bytes(s) / 4) + 2 * wide;
  void *memory = malloc(4 * floats + 64);
  Input *in = (Input *)malloc(sizeof(Input) * c.tokens);
  if (!memory || !in) {
    free(memory), free(in);
    return NO_MEMORY;
  }
  float *x = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), *parts = x + size, *e = parts + threads * size;
  float *w = e + c.tokens * wide;
  int32_t *rows = (int32_t *)(w + c.tokens * wide), *tokens = rows + wide;
  widen<WEIGHT>(c, x);
  inputs(c, s, x, (char *)(tokens + wide), in);
  int64_t count = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team own = team();
    if (r.bits == 4) scores<WEIGHT, 4>(c, r, s, in, own, e);
    else if (r.bits == 3) scores<WEIGHT, 3>(c, r, s, in, own, e);
    else scores<WEIGHT, 2>(c, r, s, in, own, e);
#pragma omp barrier
    choose(c, r, own, e, w);
#pragma omp barrier
#pragma omp master
    count = wanted(c, w, tokens, rows);
#pragma omp barrier
    compute<WEIGHT>(c, w, rows, count, x, parts, own);
  }
  free(memory), free(in);
  return OK;
}
"""

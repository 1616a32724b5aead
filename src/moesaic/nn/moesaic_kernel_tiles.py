"""The `moesaic` architecture: the C++ source of its CPU kernel for CPUs that multiply tiles of bf16 (AMX).

It stands behind that of `moesaic_kernel_blocks.py`, which calls it. Where there is no such unit it says so, and blocks
are computed by vectors.
"""

TILES = r"""
// A block of neurons for all its tokens, 16 at a time, by tiles of 16 x 32. A tile takes so little time that reading
// the weights remains the limit up to some 200 tokens. So tokens that do not want a neuron are not picked out of a
// tile: their weight is 0. Weights are read as they lie: gate and up by tiles of 16 neurons, down by pairs of neurons.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MEMORY __asm__ volatile("" ::: "memory")  // compilers do not know what tiles read and write

static bool by_tiles(const Call &c, const bf16 *) {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, the tiles' data
  return allowed && c.d_model % 32 == 0;
}

// Elements of 4 bytes that each thread needs: of xs, sums, h, copies.
static int64_t tile_room(int64_t tokens, int64_t d) {
  const int64_t all = (tokens + 15) / 16 * 16;
  return all * d / 2 + all * d + all * NEURONS / 2 + 16 * d;
}

// Every tile has 16 rows of 64 bytes.
static void configure() {
  alignas(64) uint8_t shape[64] = {1};
  for (int tile = 0; tile < 8; tile++) shape[16 + 2 * tile] = 64, shape[48 + tile] = 16;
  _tile_loadconfig(shape);
}

// Rows and columns of 16 x 16 pairs change places.
static inline void turn(__m512i *v) {
  __m512i a[16], b[16];
  UNROLLED for (int i = 0; i < 16; i += 2)
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  UNROLL for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(p, r, 0x88), v[i + 8] = _mm512_shuffle_i32x4(p, r, 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(q, s, 0x88), v[i + 12] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
}

// Rows that memory should give, line after line as they lie there: 16 rows at a time would be as many places in it.
// That gains 7 % where rows are short. Of longer rows the CPU itself fetches what follows, and this would delay it.
static inline bool fetches(const Call &c) { return c.d_model < 896; }

struct Ahead {
  const int32_t *rows;
  int64_t count, d, row = 0, at = 0;
  template <class F> void lines(int64_t number, F fetch) {
    for (; number > 0 && row < count; number--) {
      fetch(rows[row], at);
      if ((at += 32) == d) at = 0, row++;
    }
  }
};
static inline void fetch_line(const bf16 *p) { __builtin_prefetch(p, 0, 2); }

struct TilePart {
  const Call &c;
  const bf16 *x;   // [T, wide]
  const float *w;  // [T, P]
  int64_t wide;
  float *y, *weight;          // [T, wide]; [NEURONS, APART], of the tokens of the list
  int32_t *list;              // tokens that are computed, [MANY]
  bf16 *xs;                   // the list's tokens: [tokens / 16, D / 32, 16 pairs, 16 tokens, 2]
  float *sums;                // and what they have so far: [tokens / 16, D / 16, 16 tokens, 16]
  bf16 *h, *copies;           // [tokens, NEURONS]; 16 rows of gate and of up that do not follow each other
  int n = 0;                  // tokens of the list
  int64_t own(int64_t at) const { return at * c.d_model; }
  const bf16 *row(const void *all, int64_t stride, int64_t p) const { return (const bf16 *)all + p * stride; }

  // `left` rows from this block on, for those that memory should give next; 0 for none.
  void block(const int32_t *rows, int count, int64_t left) {
    tokens(rows, count);
    for (int first = 0; first < NEURONS; first += 16) {
      if (first >= count) {  // neurons that a tile has beyond the block's
        for (int t = 0; t < n; t++) memset(h + t * NEURONS + first, 0, 2 * (NEURONS - first));
        break;
      }
      activations(rows, first, count - first < 16 ? count - first : 16, left);
    }
    down(rows, count, (int)(left - count < NEURONS ? left - count : NEURONS));
  }

  // Which tokens, and the weights of the block's neurons for them: all tokens, where that takes hardly more tiles.
  void tokens(const int32_t *rows, int count) {
    int32_t found[MANY];
    int some = 0;
    __m512i places[NEURONS / 16];
    __mmask16 mine[NEURONS / 16];
    for (int j = 0; j < NEURONS; j += 16) {
      mine[j / 16] = (__mmask16)(count - j >= 16 ? 0xffff : count > j ? (1 << (count - j)) - 1 : 0);
      places[j / 16] = _mm512_maskz_loadu_epi32(mine[j / 16], rows + j);
    }
    const bool follow = rows[count - 1] - rows[0] == count - 1;
    const auto of = [&](int64_t t, int part) {  // weights of 16 neurons
      const float *all = w + t * c.neurons;
      if (follow) return _mm512_maskz_loadu_ps(mine[part], all + rows[0] + 16 * part);
      return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mine[part], places[part], all, 4);
    };
    for (int64_t t = 0; t < c.tokens; t++) {
      __m512i any = _mm512_setzero_si512();
      for (int part = 0; part < NEURONS / 16; part++) any = _mm512_or_si512(any, (__m512i)of(t, part));
      found[some] = (int32_t)t;
      some += _mm512_test_epi32_mask(any, any) != 0;
    }
    if ((some + 15) / 16 * 2 > (c.tokens + 15) / 16) {
      some = (int)c.tokens;
      for (int t = 0; t < some; t++) found[t] = t;
    }
    if (some != n || memcmp(found, list, some * sizeof *list)) {
      flush();
      memcpy(list, found, some * sizeof *list);
      n = some;
      spread();
      memset(sums, 0, own((n + 15) / 16 * 16) * sizeof *sums);
    }
    for (int begin = 0; begin < n; begin += 16)
      for (int part = 0; part < NEURONS / 16; part++) {
        __m512i of_token[16] = {};
        for (int t = 0; t < 16 && begin + t < n; t++) of_token[t] = (__m512i)of(list[begin + t], part);
        turn(of_token);
        for (int j = 0; j < 16; j++) _mm512_storeu_si512(weight + (16 * part + j) * APART + begin, of_token[j]);
      }
  }

  void flush() {
    MEMORY;
    for (int t = 0; t < n; t++)
      for (int64_t i = 0; i < c.d_model; i += 16) {
        const f32x16 more = load(y + list[t] * wide + i) + load(sums + own(t / 16 * 16) + 16 * i + t % 16 * 16);
        memcpy(y + list[t] * wide + i, &more, sizeof more);
      }
  }

  void spread() {
    for (int begin = 0; begin < n; begin += 16)
      for (int64_t i = 0; i < c.d_model; i += 32) {
        __m512i pairs[16];
        for (int t = 0; t < 16; t++)  // a last group is filled up with its last token
          pairs[t] = _mm512_loadu_si512(x + list[begin + t < n ? begin + t : n - 1] * wide + i);
        turn(pairs);
        memcpy(xs + own(begin) + 16 * i, pairs, sizeof pairs);
      }
  }

  // 16 rows of gate or up, `count` of them wanted, as one matrix; what stands between its rows, in bytes.
  const bf16 *together(const void *all, int64_t stride, const int32_t *rows, int count, bf16 *copy, int64_t *bytes) {
    if (count == 16 && rows[15] - rows[0] == 15) {
      *bytes = 2 * stride;
      return row(all, stride, rows[0]);
    }
    for (int j = 0; j < 16; j++)
      memcpy(copy + own(j), row(all, stride, rows[j < count ? j : count - 1]), 2 * c.d_model);
    *bytes = 2 * c.d_model;
    return copy;
  }

  // h of the neurons [first, first + 16) of the block.
  void activations(const int32_t *rows, int first, int count, int64_t left) {
    int64_t gate_bytes = 0, up_bytes = 0;
    const bf16 *gate = nullptr, *up = together(c.up, c.up_stride, rows + first, count, copies, &up_bytes);
    if (c.gate) gate = together(c.gate, c.gate_stride, rows + first, count, copies + own(16), &gate_bytes);
    // Memory gives the next neurons' gate and up meanwhile, each in a pass of its own if there are two.
    const int64_t after = left - first - 16 < 0 ? 0 : left - first - 16 < 16 ? left - first - 16 : 16;
    Ahead gates = {rows + first + 16, c.gate ? after : 0, c.d_model}, ups = {rows + first + 16, after, c.d_model};
    const int up_in = n > 32 ? 32 : 0;
    MEMORY;
    for (int begin = 0; begin < n; begin += 32) {
      alignas(64) float found[4][16][16];  // gate and up of 16 tokens, and of the next
      const bool two = begin + 16 < n;
      const bf16 *a = xs + own(begin), *b = xs + own(begin + 16);
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      for (int64_t i = 0; i < c.d_model; i += 32) {
        if (begin == 0) gates.lines(16, [&](int64_t p, int64_t at) { fetch_line(row(c.gate, c.gate_stride, p) + at); });
        if (begin == up_in) ups.lines(16, [&](int64_t p, int64_t at) { fetch_line(row(c.up, c.up_stride, p) + at); });
        _tile_loadd(5, up + i, up_bytes);
        _tile_loadd(6, a + 16 * i, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
          _tile_loadd(7, b + 16 * i, 64);
          _tile_dpbf16ps(3, 5, 7);
        }
        if (!gate) continue;
        _tile_loadd(4, gate + i, gate_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (two) { _tile_dpbf16ps(2, 4, 7); }
      }
      _tile_stored(0, found[0], 64); _tile_stored(1, found[1], 64);
      if (two) { _tile_stored(2, found[2], 64); _tile_stored(3, found[3], 64); }
      MEMORY;
      for (int part = 0; part <= two; part++)
        weigh_tile(found[2 * part], found[2 * part + 1], rows, first, count, begin + 16 * part);
    }
  }

  void weigh_tile(float (*gate)[16], float (*up)[16], const int32_t *rows, int first, int count, int begin) {
    __m512i pairs[16] = {};
    for (int j = 0; j < count; j += 2) {
      f32x16 v[2] = {};
      for (int k = j; k < j + 2 && k < count; k++)
        v[k - j] = weighed<bf16>(c, load(gate[k]), load(up[k]), rows[first + k], weight + (first + k) * APART + begin);
      Product<bf16>::paired(v[0], v[1], (bf16 *)(pairs + j / 2));
    }
    turn(pairs);
    for (int t = 0; t < 16; t++)
      _mm256_storeu_si256((__m256i *)(h + (begin + t) * NEURONS + first), _mm512_castsi512_si256(pairs[t]));
  }

  // Memory gives the rows of down of the next block, `after` of them, meanwhile.
  void down(const int32_t *rows, int count, int after) {
    alignas(64) __m512i packed[NEURONS / 2][2];
    Ahead next = {rows + count, after, c.d_model};
    for (int64_t column = 0; column < c.d_model; column += 32) {
      for (int s = 0; s < NEURONS / 2; s++) {  // beyond the block's neurons, activations are 0
        const bf16 *pair[2];
        for (int k = 0; k < 2; k++)
          pair[k] = row(c.down, c.down_stride, rows[2 * s + k < count ? 2 * s + k : count - 1]) + column;
        Product<bf16>::pack(pair, packed[s]);
      }
      next.lines(NEURONS, [&](int64_t p, int64_t at) { fetch_line(row(c.down, c.down_stride, p) + at); });
      MEMORY;
      _tile_loadd(4, packed[0], 128); _tile_loadd(5, packed[0] + 1, 128);
      _tile_loadd(6, packed[16], 128); _tile_loadd(7, packed[16] + 1, 128);
      for (int begin = 0; begin < n; begin += 16) {
        float *to = sums + own(begin) + 16 * column;
        _tile_loadd(0, to, 64); _tile_loadd(1, to + 256, 64);
        _tile_loadd(2, h + begin * NEURONS, 2 * NEURONS); _tile_loadd(3, h + begin * NEURONS + 32, 2 * NEURONS);
        _tile_dpbf16ps(0, 2, 4); _tile_dpbf16ps(1, 2, 5);
        _tile_dpbf16ps(0, 3, 6); _tile_dpbf16ps(1, 3, 7);
        _tile_stored(0, to, 64); _tile_stored(1, to + 256, 64);
      }
    }
  }
};

static void tile_part(const Call &c, const bf16 *x, const float *w, int64_t wide, const int32_t *rows, int64_t count,
                      float *y, int32_t *list, float *weight, float *room) {
  const int64_t all = (c.tokens + 15) / 16 * 16;
  float *sums = room + all * c.d_model / 2;
  bf16 *h = (bf16 *)(sums + all * c.d_model);
  TilePart part = {c, x, w, wide, y, weight, list, (bf16 *)room, sums, h, h + all * NEURONS};
  configure();
  for (int64_t i = 0; i < count; i += NEURONS)
    part.block(rows + i, (int)(count - i < NEURONS ? count - i : NEURONS), fetches(c) ? count - i : 0);
  part.flush();
  _tile_release();
}
#else
static bool by_tiles(const Call &, const bf16 *) { return false; }
static int64_t tile_room(int64_t, int64_t) { return 0; }
static void tile_part(const Call &, const bf16 *, const float *, int64_t, const int32_t *, int64_t, float *, int32_t *,
                      float *, float *) {}
#endif
"""

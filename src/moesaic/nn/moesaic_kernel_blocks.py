"""The `moesaic` architecture: the C++ source of its CPU kernel for some and many tokens (see `moesaic_kernel.py`).

It stands behind that of `moesaic_kernel_source.py`, whose types and functions it uses.
"""

BLOCKS = r"""
// The same sum as moesaic_rows, for some and many tokens. A block of neurons at a time: first the activations of every
// neuron for those tokens that want it, then what the block adds to every token that wants any of it. So gate and up
// cost a token what it wants, whatever the sets are. Down does so where neighbouring neurons have the same owners.
// On CPUs that multiply pairs of bf16, activations are rounded to bf16, as torch rounds them.
static const int NEURONS = 64;    // of a block
static const int GROUP = 16;      // tokens that stay in L1 while a block's neurons pass by; a vector of activations
static const int64_t MANY = 256;  // tokens that are computed together
static const int64_t APART = MANY + 16;  // a neuron's tokens and room: powers of two crowd caches

#ifdef __AVX512F__
#define SIZES(CASE) CASE(1) CASE(2) CASE(4) CASE(6) CASE(8)
static const int TILE = 8;        // tokens whose sums stay in registers: the largest of SIZES
#else
#define SIZES(CASE) CASE(1) CASE(2) CASE(4)
static const int TILE = 4;
#endif

// How W is multiplied: X is the type of tokens and activations, V a register of LANES of them, of PAIR per sum.
template <class W> struct Product {
  typedef float X;
  typedef f32x16 V;
  static const int LANES = 16, PAIR = 1;
  static V weights(const W *p) { return load(p); }
  static V tokens(const X *p) { return load(p); }
  static V all(const X *p) { return *p - (f32x16){}; }
  static void paired(f32x16 v, f32x16, X *out) { memcpy(out, &v, sizeof v); }
  static f32x16 add(f32x16 total, V a, V b) { return total + a * b; }
  static void pack(const W *const *rows, V *out) { out[0] = load(rows[0]), out[1] = load(rows[0] + 16); }
};
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
static const uint16_t INTERLEAVED[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
template <> struct Product<bf16> {
  typedef bf16 X;
  typedef __m512i V;
  static const int LANES = 32, PAIR = 2;
  static V weights(const bf16 *p) { return _mm512_loadu_si512(p); }
  static V tokens(const bf16 *p) { return _mm512_loadu_si512(p); }
  static V all(const bf16 *p) { int32_t two; memcpy(&two, p, 4); return _mm512_set1_epi32(two); }
  static void paired(f32x16 v, f32x16 w, X *out) {
    const V both = (V)_mm512_cvtne2ps_pbh((__m512)w, (__m512)v), high = _mm512_alignr_epi64(both, both, 4);
    const V all = _mm512_permutex2var_epi16(both, _mm512_loadu_si512(INTERLEAVED), high);
    memcpy(out, &all, sizeof all);
  }
  static f32x16 add(f32x16 total, V a, V b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
  }
  static void pack(const bf16 *const *rows, V *out) {  // columns 0 .. 31 of two rows, side by side
    const V low = _mm512_loadu_si512(INTERLEAVED), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const V a = weights(rows[0]), b = weights(rows[1]);
    out[0] = _mm512_permutex2var_epi16(a, low, b), out[1] = _mm512_permutex2var_epi16(a, high, b);
  }
};
#endif

// Sums of N vectors.
template <int N> static inline void sums(const f32x16 *v, float *out) {
#ifdef __AVX512F__
  UNROLLED for (int i = 0; i + 4 <= N; i += 4) {
    const __m512 a = (__m512)v[i], b = (__m512)v[i + 1], c = (__m512)v[i + 2], d = (__m512)v[i + 3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d p = (__m512d)ab, q = (__m512d)cd, low = _mm512_unpacklo_pd(p, q), high = _mm512_unpackhi_pd(p, q);
    const __m512 four = _mm512_add_ps((__m512)low, (__m512)high);
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
  }
  const int done = N / 4 * 4;
#else
  const int done = 0;
#endif
  UNROLLED for (int i = done; i < N; i++) out[i] = sum(v[i]);
}

// Two rows times N tokens. A row's last elements are copied beside zeros; those of tokens stand beside zeros already.
// FETCH of the rows `next` are asked for meanwhile.
template <class W, int N, int FETCH>
static inline void dots(const W *const *rows, const W *const *next, const typename Product<W>::X *const *x, int64_t d,
                        float *first, float *second) {
  typedef Product<W> P;
  f32x16 a[N] = {}, b[N] = {};
  int64_t i = 0;
  for (; i + P::LANES <= d; i += P::LANES) {
    UNROLLED for (int n = 0; n < FETCH; n++) __builtin_prefetch((const char *)(next[n] + i), 0, 2);
    const typename P::V wa = P::weights(rows[0] + i), wb = P::weights(rows[1] + i);
    UNROLLED for (int t = 0; t < N; t++) {
      const typename P::V xt = P::tokens(x[t] + i);
      a[t] = P::add(a[t], wa, xt), b[t] = P::add(b[t], wb, xt);
    }
  }
  if (i < d) {
    W rest[2][P::LANES] = {};
    memcpy(rest[0], rows[0] + i, (d - i) * sizeof(W)), memcpy(rest[1], rows[1] + i, (d - i) * sizeof(W));
    const typename P::V wa = P::weights(rest[0]), wb = P::weights(rest[1]);
    UNROLLED for (int t = 0; t < N; t++) {
      const typename P::V xt = P::tokens(x[t] + i);
      a[t] = P::add(a[t], wa, xt), b[t] = P::add(b[t], wb, xt);
    }
  }
  sums<N>(a, first), sums<N>(b, second);
}

template <class W, int FETCH>
static void dots_of(const W *const *rows, const W *const *next, const typename Product<W>::X *const *x, int tokens,
                    int64_t d, float *first, float *second) {
#define CASE(N) if (tokens <= N) return dots<W, N, FETCH>(rows, next, x, d, first, second);
  SIZES(CASE)
#undef CASE
}

// y_t[column, column + 32) += h_t . the packed rows, of N tokens.
template <class W, int N>
static inline void add_columns(const typename Product<W>::V (*packed)[2], int steps, const typename Product<W>::X *h,
                               float *const *y, int64_t column) {
  typedef Product<W> P;
  f32x16 a[N][2];
  UNROLLED for (int t = 0; t < N; t++) a[t][0] = load(y[t] + column), a[t][1] = load(y[t] + column + 16);
  for (int s = 0; s < steps; s++) UNROLLED for (int t = 0; t < N; t++) {
    const typename P::V ht = P::all(h + (s * APART + t) * P::PAIR);
    a[t][0] = P::add(a[t][0], packed[s][0], ht), a[t][1] = P::add(a[t][1], packed[s][1], ht);
  }
  UNROLLED for (int t = 0; t < N; t++) {
    memcpy(y[t] + column, &a[t][0], sizeof(f32x16)), memcpy(y[t] + column + 16, &a[t][1], sizeof(f32x16));
  }
}

template <class W>
static inline f32x16 weighed(const Call &c, f32x16 gate, f32x16 up, int64_t p, const float *times) {
  up += c.up_bias ? one((const W *)c.up_bias + p) : 0;
  if (c.gate) up *= activate(gate + (c.gate_bias ? one((const W *)c.gate_bias + p) : 0), c.activation);
  else up = activate(up, c.activation);
  const f32x16 w = load(times);
  return w == 0 ? (f32x16){} : up * w;
}

// A thread's part: its sums y [T, wide], and what it needs for one block.
template <class W> struct Part {
  typedef Product<W> P;
  typedef typename P::X X;
  const Call &c;
  const X *x;         // [T, wide]
  const float *w;     // [T, P]
  int64_t tokens, wide;
  float *y, *spare;   // the latter [wide], for what is not wanted
  int32_t *list;      // tokens that want any neuron of the block
  float *weight;      // [NEURONS, APART], of the tokens of the list
  X *h;               // [NEURONS / PAIR, APART, PAIR], likewise

  void block(const int32_t *rows, int count, int32_t after) {
    int n = 0;
    int64_t pairs = 0;
    for (int64_t t = 0; t < tokens; t++) {
      const float *all = w + t * c.neurons;
      int any = 0;
      for (int j = 0; j < count; j++) {
        const float own = all[rows[j]];
        weight[j * APART + n] = own;
        any += own != 0;
      }
      list[n] = (int32_t)t;
      n += any != 0, pairs += any;
    }
    const bool uniform = pairs == (int64_t)n * count;
    for (int begin = 0; begin < n; begin += GROUP)
      activations(rows, count, after, begin, n - begin < GROUP ? n : begin + GROUP, uniform);
    down(rows, count, n);
  }

  const W *gate_of(int64_t p) const { return (const W *)c.gate + p * c.gate_stride; }
  const W *up_of(int64_t p) const { return (const W *)c.up + p * c.up_stride; }
  const W *down_of(int64_t p) const { return (const W *)c.down + p * c.down_stride; }

  // h of the tokens list[begin, end). Without a gate two neurons are computed at a time.
  void activations(const int32_t *rows, int count, int32_t after, int begin, int end, bool uniform) {
    float first[NEURONS][GROUP], second[NEURONS][GROUP];  // gate and up; what no token wants stays unset
    const int step = c.gate ? 1 : 2;
    for (int j = 0; j < count; j += step) {
      const int other = j + step / 2 < count ? j + step / 2 : j;
      const int64_t p = rows[j], q = rows[other], r = j + step < count ? rows[j + step] : after;
      const W *own[2] = {c.gate ? gate_of(p) : up_of(p), up_of(q)};
      const W *next[3] = {c.gate ? gate_of(r) : up_of(r), up_of(r), down_of(r)};
      float *const a = c.gate ? first[j] : second[j], *const b = second[other];
      int wants[GROUP], found = end - begin;
      if (!uniform) found = wanting(weight + j * APART + begin, weight + other * APART + begin, end - begin, wants);
      const bool every = found == end - begin;
      for (int i = 0, parts = (found + TILE - 1) / TILE; i < parts; i++) {
        const int from = found * i / parts, size = found * (i + 1) / parts - from;
        const X *xs[TILE];
        float of_a[TILE], of_b[TILE];
        for (int t = 0; t < TILE; t++) {  // sizes between those of SIZES are filled up with the last
          const int at = from + (t < size ? t : size - 1);
          xs[t] = x + list[begin + (every ? at : wants[at])] * wide;
        }
        // Memory gives the next neuron while the first tokens are computed with this one.
        if (begin == 0 && i == 0) dots_of<W, 3>(own, next, xs, size, c.d_model, of_a, of_b);
        else dots_of<W, 0>(own, next, xs, size, c.d_model, of_a, of_b);
        for (int t = 0; t < size; t++) {
          const int at = every ? from + t : wants[from + t];
          a[at] = of_a[t], b[at] = of_b[t];
        }
      }
    }
    for (int j = 0; j < count; j += P::PAIR) {
      f32x16 pair[2] = {};
      for (int k = 0; k < P::PAIR && j + k < count; k++)
        pair[k] = weighed<W>(c, load(first[j + k]), load(second[j + k]), rows[j + k], weight + (j + k) * APART + begin);
      P::paired(pair[0], pair[1], h + j * APART + begin * P::PAIR);
    }
  }

  static int wanting(const float *a, const float *b, int size, int *wants) {
    int found = 0;
    for (int i = 0; i < size; i++) {
      wants[found] = i;
      found += (a[i] != 0) | (b[i] != 0);  // no branch: which it is cannot be predicted
    }
    return found;
  }

  // What the block adds to the tokens of the list.
  void down(const int32_t *rows, int count, int n) {
    const int steps = (count + P::PAIR - 1) / P::PAIR;
    typename P::V packed[NEURONS][2];
    for (int64_t column = 0; column < c.d_model; column += 32) {
      const int64_t left = c.d_model - column;
      for (int s = 0; s < steps; s++) {
        const W *pair[2];
        W rest[2][32] = {};
        for (int k = 0; k < P::PAIR; k++) {  // an odd one is paired with itself, times 0
          pair[k] = down_of(rows[s * P::PAIR + k < count ? s * P::PAIR + k : count - 1]) + column;
          if (left < 32) memcpy(rest[k], pair[k], left * sizeof(W)), pair[k] = rest[k];
        }
        P::pack(pair, packed[s]);
      }
      for (int i = 0, parts = (n + TILE - 1) / TILE; i < parts; i++) {
        const int from = (int64_t)n * i / parts, size = (int64_t)n * (i + 1) / parts - from;
        const X *hs = h + from * P::PAIR;
        float *ys[TILE];
        for (int t = 0; t < TILE; t++) ys[t] = t < size ? y + list[from + t] * wide : spare;
#define CASE(N) if (size <= N) { add_columns<W, N>(packed, steps, hs, ys, column); continue; }
        SIZES(CASE)
#undef CASE
      }
    }
  }
};

// Where each thread's rows begin: equal numbers of pairs of a row and a token. Reading a row counts as so many more.
static void share_out(const int32_t *pairs, const int32_t *rows, int64_t count, int reading, int threads,
                      int64_t *begin) {
  int64_t total = 0, done = 0, i = 0;
  for (int64_t k = 0; k < count; k++) total += pairs[rows[k]] + reading;
  for (int me = 0; me <= threads; me++) {
    for (; i < count && done < total * me / threads; i++) done += pairs[rows[i]] + reading;
    begin[me] = me == threads ? count : i;
  }
}

// Rows in groups of 16 that do not follow each other: a tile needs a copy of them.
static int64_t apart(const int32_t *rows, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t last = i + 16 < count ? i + 15 : count - 1;
    if (rows[last] - rows[i] != last - i) found += last - i + 1;
  }
  return found;
}

template <class W> static void widened(const W *from, float *to, int64_t d) {
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    const f32x16 v = load(from + i);
    memcpy(to + i, &v, sizeof v);
  }
  for (; i < d; i++) to[i] = one(from + i);
}
static inline void widened(const bf16 *from, bf16 *to, int64_t d) { memcpy(to, from, d * sizeof *to); }

// Numbers of floats that fill cache lines: a vector that lies in two lines takes twice as long to load.
static inline int64_t lined(int64_t n) { return (n + 31) / 32 * 32; }

// For CPUs that multiply tiles: see moesaic_kernel_tiles.py.
static bool by_tiles(const Call &c, const bf16 *);
static inline bool by_tiles(const Call &, const void *) { return false; }
static int64_t tile_room(int64_t tokens, int64_t d);
static void tile_part(const Call &c, const bf16 *x, const float *w, int64_t wide, const int32_t *rows, int64_t count,
                      float *y, int32_t *list, float *weight, float *room);
static inline void tile_part(const Call &, const void *, const float *, int64_t, const int32_t *, int64_t, float *,
                             int32_t *, float *, float *) {}

// Tokens [0, T) with T <= MANY. Memory per thread: its part of y, a list, weights and activations of a block.
template <class W> static int blocks(const Call &c, int threads) {
  typedef typename Product<W>::X X;
  const bool tiles = by_tiles(c, (const W *)nullptr);
  const int64_t wide = lined(c.d_model), room = tiles ? lined(tile_room(c.tokens, c.d_model)) : 0;
  const int64_t own = (c.tokens + 1) * wide + lined(c.tokens) + 2 * NEURONS * APART + room;
  const int64_t table = lined(c.tokens * c.neurons), row = lined(c.neurons);
  float *memory = (float *)aligned_alloc(128, sizeof(float) * (table + 2 * row + c.tokens * wide + threads * own));
  int64_t *begin = (int64_t *)malloc(sizeof(int64_t) * (threads + 1));
  int failed = memory && begin ? OK : NO_MEMORY;
  float *w = memory, *mine = w + table + 2 * row;
  int32_t *rows = (int32_t *)(w + table), *pairs = rows + row;
  X *x = (X *)(mine + threads * own);
  if (!failed) failed = weigh(c, w);
  if (!failed) {
    int64_t count = wanted(c, w, pairs, rows);
    if (tiles && 5 * (count + apart(rows, count)) > 7 * c.neurons)  // quicker then: also what no token wants
      for (count = 0; count < c.neurons; count++) rows[count] = (int32_t)count;
    share_out(pairs, rows, count, tiles ? 200 : 4, threads, begin);
    memset(x, 0, c.tokens * wide * sizeof(X));
    for (int64_t t = 0; t < c.tokens; t++) widened((const W *)c.x + t * c.d_model, x + t * wide, c.d_model);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      int me = 0, team = 1;
#ifdef _OPENMP
      me = omp_get_thread_num(), team = omp_get_num_threads();
#endif
      for (int part = me; part < threads; part += team) {  // a smaller team than asked for does the others' parts too
        float *y = mine + part * own, *spare = y + c.tokens * wide;
        float *weight = spare + wide, *h = weight + NEURONS * APART;
        memset(y, 0, c.tokens * wide * sizeof(float));
        int32_t *list = (int32_t *)(h + NEURONS * APART);
        if (tiles) {
          float *own_room = (float *)list + lined(c.tokens);
          tile_part(c, x, w, wide, rows + begin[part], begin[part + 1] - begin[part], y, list, weight, own_room);
          continue;
        }
        Part<W> todo = {c, x, w, c.tokens, wide, y, spare, list, weight, (X *)h};
        const int64_t most = sizeof(W) > 2 ? NEURONS / 2 : NEURONS;  // so that a block stays in a cache
        for (int64_t i = begin[part]; i < begin[part + 1]; i += most) {
          const int64_t left = begin[part + 1] - i;
          todo.block(rows + i, (int)(left < most ? left : most), rows[left > most ? i + most : i]);
        }
      }
#pragma omp barrier
      for (int64_t t = c.tokens * me / team; t < c.tokens * (me + 1) / team; t++)
        for (int64_t i = 0; i < c.d_model; i++) {
          float total = mine[t * wide + i];
          for (int other = 1; other < threads; other++) total += mine[other * own + t * wide + i];
          narrow(total, (W *)c.y + t * c.d_model + i);
        }
    }
  }
  free(memory), free(begin);
  return failed;
}

// How many neurons the tokens want in all; -1 for an expert that does not exist, or without memory.
static int64_t wanted_by_all(const Call &c) {
  float *w = (float *)malloc(sizeof(float) * c.tokens * c.neurons);
  int64_t found = 0;
  if (!w || weigh(c, w)) found = -1;
  else for (int64_t i = 0; i < c.tokens * c.neurons; i++) found += w[i] != 0;
  free(w);
  return found;
}

extern "C" int moesaic_blocks(const Call *call) {
  if (call->activation < SILU || call->activation > RELU_SQUARED) return UNKNOWN_ACTIVATION;
  // Of few tokens, tiles gain only where a neuron is wanted by most of them.
  if (call->tokens < 5 && by_tiles(*call, (const WEIGHT *)nullptr) && 2 * wanted_by_all(*call) < 5 * call->neurons)
    return moesaic_rows(call);
  const int64_t useful = call->neurons / SHARE + 1, most = call->threads < 1 ? 1 : call->threads;
  for (int64_t t = 0; t < call->tokens; t += MANY) {
    Call c = *call;
    c.tokens = call->tokens - t < MANY ? call->tokens - t : MANY;
    c.x = (const WEIGHT *)c.x + t * c.d_model, c.y = (WEIGHT *)c.y + t * c.d_model;
    if (c.chosen) c.chosen += t * c.top_k;
    if (c.chosen_weight) c.chosen_weight += t * c.top_k;
    if (const int failed = blocks<WEIGHT>(c, (int)(most < useful ? most : useful))) return failed;
  }
  return OK;
}
"""

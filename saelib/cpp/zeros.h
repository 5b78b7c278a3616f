// Products of a dense matrix that pass over its zeros. One instruction multiplies and adds a float or two neighbours in bfloat16, so
// that both types share all code but `multiply_add` and what packs words.
#pragma once
#include "lanes.h"

constexpr int64_t TILE = 32;  // rows of 256 words that the first cache holds, and bits in a mask
constexpr int64_t TOKENS = 256, LATENTS = 128;  // rows of results that the second cache holds

inline Words widen(const Half* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline Words in_pair(Words low, Words high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

#ifdef __AVX512BF16__
inline Floats add_pairs(Floats a, Floats b, Floats sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline Words rounded(Floats a) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a)); }  // to bfloat16, in the lower halves
#else
inline Floats low(Floats pair) { return (Floats)_mm512_slli_epi32((Words)pair, 16); }
inline Floats high(Floats pair) { return (Floats)_mm512_and_si512((Words)pair, _mm512_set1_epi32(0xFFFF0000)); }
inline Floats add_pairs(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum)); }
inline Words rounded(Floats a) {  // to the nearest, and to the even one of two; what is not a number stays so
  const Words bits = (Words)a, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Words near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000)), 16);
}
#endif

template <bool pairs>
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  if constexpr (pairs) return add_pairs(a, b, sum);
  else return _mm512_fmadd_ps(a, b, sum);
}

// f(a constant of so many registers, first word) until all words of a row have been in registers
template <typename F>
void over_columns(int64_t n_words, F f) {
  for (int64_t at = 0; at < n_words;) {
    int64_t left = (n_words - at) / LANES;
    if (left >= 16) f(std::integral_constant<int, 16>(), at), at += 16 * LANES;
    else if (left >= 8) f(std::integral_constant<int, 8>(), at), at += 8 * LANES;
    else if (left >= 4) f(std::integral_constant<int, 4>(), at), at += 4 * LANES;
    else f(std::integral_constant<int, 1>(), at), at += LANES;
  }
}

inline uint32_t nonzero(const Word* p, int64_t n) {  // of a tile, or of half of one at the end of a row
  uint32_t low = _mm512_test_epi32_mask(words(p), words(p));
  return n > LANES ? low | (uint32_t)_mm512_test_epi32_mask(words(p + LANES), words(p + LANES)) << LANES : low;
}

// sums += Σ_i factors_i rows_i, over the factors of a tile that are not zero
template <bool pairs, int width>
inline void add_rows(const Word* factors, uint32_t left, const Word* rows, int64_t stride, float* sums) {
  Floats sum[width];
#pragma GCC unroll 16
  for (int v = 0; v < width; v++) sum[v] = _mm512_loadu_ps(sums + v * LANES);
  for (; left; left &= left - 1) {
    int64_t i = __builtin_ctz(left);
    Floats factor = (Floats)_mm512_set1_epi32(factors[i]);
#pragma GCC unroll 16
    for (int v = 0; v < width; v++) sum[v] = multiply_add<pairs>(factor, (Floats)words(rows + i * stride + v * LANES), sum[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < width; v++) _mm512_storeu_ps(sums + v * LANES, sum[v]);
}

// out_b += Σ_j values_bj rows_j
template <bool pairs>
void decode(const Word* values, const Word* rows, float* out, int64_t batch, int64_t n, int64_t d) {
  at::parallel_for(0, batch, LANES, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += TOKENS)
      for (int64_t j = 0; j < n; j += TILE)
        over_columns(d, [&](auto width, int64_t column) {
          for (int64_t b = block; b < std::min(end, block + TOKENS); b++)
            if (uint32_t left = nonzero(values + b * n + j, n - j))
              add_rows<pairs, width>(values + b * n + j, left, rows + j * d + column, d, out + b * d + column);
        });
  });
}

inline void transpose(Words* rows) {  // 16 registers of 16 words
#pragma GCC unroll 4
  for (int s = 8; s; s /= 2) {  // swap the off-diagonal blocks of s words
    const Words step = _mm512_set1_epi32(s), other = _mm512_add_epi32(counting, _mm512_set1_epi32(LANES));
    const __mmask16 right = _mm512_test_epi32_mask(counting, step);
    const Words upper = _mm512_mask_sub_epi32(counting, right, other, step), lower = _mm512_mask_mov_epi32(_mm512_add_epi32(counting, step), right, other);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & s)) {
        Words a = rows[i], b = rows[i + s];
        rows[i] = _mm512_permutex2var_epi32(a, upper, b), rows[i + s] = _mm512_permutex2var_epi32(a, lower, b);
      }
  }
}

// the values of 16 latents for one word of tokens: one token, or two side by side
inline Words column_words(const float* values, int64_t n, int64_t tokens) { return tokens > 0 ? words(values) : _mm512_setzero_si512(); }
inline Words column_words(const Half* values, int64_t n, int64_t tokens) {
  return tokens > 1 ? in_pair(widen(values), widen(values + n)) : tokens > 0 ? widen(values) : _mm512_setzero_si512();
}

// out_j += Σ_b values_bj tokens_b
template <bool pairs, typename Element>
void sum_tokens(const Element* values, const Word* tokens, float* out, int64_t batch, int64_t n, int64_t d) {
  constexpr int64_t each = pairs ? 2 : 1;  // tokens in a word
  at::parallel_for(0, n / LANES, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Word tile[LANES][TILE];
    for (int64_t block = begin * LANES; block < end * LANES; block += LATENTS)
      for (int64_t b = 0; b < batch; b += TILE * each)
        for (int64_t j = block; j < std::min(end * LANES, block + LATENTS); j += LANES) {
          for (int64_t half = 0; half < TILE; half += LANES) {
            Words square[LANES];
            for (int64_t t = 0; t < LANES; t++) {
              int64_t token = b + (half + t) * each;
              square[t] = column_words(values + token * n + j, n, batch - token);
            }
            transpose(square);
            for (int64_t i = 0; i < LANES; i++) _mm512_store_si512(tile[i] + half, square[i]);
          }
          over_columns(d, [&](auto width, int64_t column) {
            for (int64_t i = 0; i < LANES; i++)
              if (uint32_t left = nonzero(tile[i], TILE))
                add_rows<pairs, width>(tile[i], left, tokens + b / each * d + column, d, out + (j + i) * d + column);
          });
        }
  });
}

inline float get(const float* p) { return *p; }
inline float get(const Half* p) { return _mm512_cvtss_f32((Floats)_mm512_set1_epi32(bits(*p))); }
inline void put(float* p, float value) { *p = value; }
inline void put(Half* p, float value) { *p = (Half)_mm_cvtsi128_si32(_mm512_castsi512_si128(rounded(_mm512_set1_ps(value)))); }
inline uint32_t active(const float* p) { return nonzero((const Word*)p, TILE); }
inline uint32_t active(const Half* p) { return _mm512_test_epi16_mask(words(p), words(p)); }

// out_bj = <tokens_b, rows_j> + start_bj where values_bj is not zero, else 0
template <bool pairs, typename Element>
void masked_product(const Element* values, const Word* tokens, const Word* rows, const Element* start, int64_t down, int64_t right, Element* out, int64_t batch, int64_t n, int64_t d) {
  at::parallel_for(0, batch, LANES, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += TOKENS)
      for (int64_t j = 0; j < n; j += TILE)
        for (int64_t b = block; b < std::min(end, block + TOKENS); b++) {
          Element* here = out + b * n + j;
          std::fill(here, here + TILE, Element(0));
          for (uint32_t left = active(values + b * n + j); left; left &= left - 1) {
            int64_t i = __builtin_ctz(left);
            Floats sum[2] = {};
            const Word *token = tokens + b * d, *row = rows + (j + i) * d;
            auto add = [&](int v, int64_t c) { sum[v] = multiply_add<pairs>((Floats)words(token + c), (Floats)words(row + c), sum[v]); };
            int64_t c = 0;
            for (; c + LANES < d; c += 2 * LANES) add(0, c), add(1, c + LANES);
            if (c < d) add(0, c);
            put(here + i, get(start + b * down + (j + i) * right) + _mm512_reduce_add_ps(sum[0] + sum[1]));
          }
        }
  });
}

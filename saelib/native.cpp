// What `saelib.native` compiles, for CPUs with AVX-512. A word is 32 bits: a float, or two neighbours in bfloat16, which one
// instruction multiplies and adds. So both types share all code but `multiply_add` and what packs words.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <vector>

using at::Tensor;
using Floats = __m512;
using Words = __m512i;
using Word = uint32_t;
using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t LANES = 16;  // words in a register
constexpr int64_t TILE = 32;   // rows of 256 words that the first cache holds, and bits in a mask
constexpr int64_t LOWEST = std::numeric_limits<int32_t>::min();  // a key below all
constexpr int64_t TOKENS = 256, LATENTS = 128;  // rows of results that the second cache holds

template <typename T> T* data(const Tensor& tensor) { return (T*)tensor.data_ptr(); }
bool is_half(const Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

void expect(const Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.sizes() == at::IntArrayRef({rows, columns}),
              "a tensor is ", tensor.scalar_type(), tensor.sizes(), ": it must be ", type, " [", rows, ", ", columns, "], contiguous, on the CPU");
}

inline __mmask16 first(int64_t n) { return n < LANES ? (1u << n) - 1 : 0xFFFF; }
const Words counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
inline Words words(const void* p) { return _mm512_loadu_si512(p); }
inline Words widen(const Half* p, __mmask16 lanes = 0xFFFF) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)); }
inline Words in_pair(Words low, Words high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

// ---- the k largest of each row ----

// floats as whole numbers in the same order; what is not a number is above all
inline Words in_order(Words bits) {
  Words magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  Words key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7FFFFFFF)));
  return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000)), key, _mm512_set1_epi32(0x7FFFFFFF));
}

inline Words float_bits(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_epi32(lanes, p); }
inline Words float_bits(const Half* p, __mmask16 lanes) { return _mm512_slli_epi32(widen(p, lanes), 16); }

// The k-th largest differs little from token to token: what is above the last one, less a gap, is seldom more than 2 k numbers.
template <typename Element>
void largest(const Element* values, int64_t rows, int64_t n, int64_t k, Element* found, int32_t* places) {
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(n + LANES), at(n + LANES);
    std::vector<int64_t> kept(n);  // a key above its place
    int64_t least = LOWEST, gap = 1 << 20;
    for (int64_t row = begin; row < end; row++) {
      const Element* from = values + row * n;
      int64_t count = 0;
      for (;; least = std::max(least - gap, LOWEST), gap *= 2) {
        count = 0;
        for (int64_t i = 0; i < n; i += LANES) {
          const __mmask16 lanes = first(n - i);
          const Words key = in_order(float_bits(from + i, lanes));
          const __mmask16 above = _mm512_mask_cmpge_epi32_mask(lanes, key, _mm512_set1_epi32(least));
          // compressed in a register: compressing into memory is slow on some of these CPUs
          _mm512_storeu_si512(&keys[count], _mm512_maskz_compress_epi32(above, key));
          _mm512_storeu_si512(&at[count], _mm512_maskz_compress_epi32(above, _mm512_add_epi32(counting, _mm512_set1_epi32(i))));
          count += __builtin_popcount(above);
        }
        if (count >= k) break;
      }
      if (count > 2 * k) gap = std::max<int64_t>(gap / 2, 1);
      for (int64_t i = 0; i < count; i++) kept[i] = keys[i] * (1LL << 32) | at[i];
      std::nth_element(kept.begin(), kept.begin() + k - 1, kept.begin() + count, std::greater<int64_t>());
      for (int64_t i = 0; i < k; i++) places[row * k + i] = (int32_t)kept[i], found[row * k + i] = from[places[row * k + i]];
      least = std::max((kept[k - 1] >> 32) - gap, LOWEST);
    }
  });
}

// ---- products that pass over zeros ----

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
inline float get(const Half* p) { return _mm512_cvtss_f32((Floats)float_bits(p, 1)); }
inline void put(float* p, float value) { *p = value; }
inline void put(Half* p, float value) { *p = (Half)_mm_cvtsi128_si32(_mm512_castsi512_si128(rounded(_mm512_set1_ps(value)))); }
inline uint32_t active(const float* p) { return nonzero((const Word*)p, TILE); }
inline uint32_t active(const Half* p) { return _mm512_test_epi16_mask(words(p), words(p)); }

// out_bj = <tokens_b, rows_j> + start_bj where values_bj is not zero, else 0
template <bool pairs, typename Element>
void masked_product(const Element* values, const Word* tokens, const Word* rows, const Tensor& start, Element* out, int64_t batch, int64_t n, int64_t d) {
  const Element* from = data<Element>(start);
  const int64_t down = start.stride(0), right = start.stride(1);
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
            put(here + i, get(from + b * down + (j + i) * right) + _mm512_reduce_add_ps(sum[0] + sum[1]));
          }
        }
  });
}

// ---- tensors ----

// [m, d] floats -> [m / 2, d] words of two rows side by side
Tensor in_pairs(const Tensor& rows) {
  const int64_t m = rows.size(0), d = rows.size(1);
  Tensor out = at::empty({(m + 1) / 2, d}, rows.options().dtype(at::kInt));
  at::parallel_for(0, (m + 1) / 2, LANES, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t c = 0; c < d; c += LANES) {
        auto row = [&](int64_t at) { return at < m ? rounded(_mm512_loadu_ps(data<float>(rows) + at * d + c)) : _mm512_setzero_si512(); };
        _mm512_storeu_si512(data<Word>(out) + i * d + c, in_pair(row(2 * i), row(2 * i + 1)));
      }
  });
  return out;
}

void expect_sizes(const Tensor& values, int64_t d) {
  expect(values, values.size(0), values.size(1), is_half(values) ? at::kBFloat16 : at::kFloat);
  TORCH_CHECK(values.size(1) % TILE == 0 && d % TILE == 0, "latents and dimensions are ", values.size(1), " and ", d, ": they must be multiples of ", TILE);
}

std::tuple<Tensor, Tensor> largest_of(const Tensor& values, int64_t k) {
  const int64_t rows = values.size(0), n = values.size(1);
  expect(values, rows, n, is_half(values) ? at::kBFloat16 : at::kFloat);
  TORCH_CHECK(1 <= k && k <= n, "k is ", k, ": it must be from 1 to ", n);
  Tensor found = at::empty({rows, k}, values.options()), places = at::empty({rows, k}, values.options().dtype(at::kInt));
  if (is_half(values)) largest(data<Half>(values), rows, n, k, data<Half>(found), data<int32_t>(places));
  else largest(data<float>(values), rows, n, k, data<float>(found), data<int32_t>(places));
  return {found, places};
}

Tensor decode_of(const Tensor& values, const Tensor& rows) {
  const int64_t batch = values.size(0), n = values.size(1), d = rows.size(1);
  expect_sizes(values, d);
  expect(rows, n, d, at::kFloat);
  Tensor out = at::zeros({batch, d}, rows.options());
  if (is_half(values)) decode<true>(data<Word>(values), data<Word>(in_pairs(rows)), data<float>(out), batch, n / 2, d);
  else decode<false>(data<Word>(values), data<Word>(rows), data<float>(out), batch, n, d);
  return out;
}

Tensor sum_tokens_of(const Tensor& values, const Tensor& tokens) {
  const int64_t batch = values.size(0), n = values.size(1), d = tokens.size(1);
  expect_sizes(values, d);
  expect(tokens, batch, d, at::kFloat);
  Tensor out = at::zeros({n, d}, tokens.options());
  if (is_half(values)) sum_tokens<true>(data<Half>(values), data<Word>(in_pairs(tokens)), data<float>(out), batch, n, d);
  else sum_tokens<false>(data<float>(values), data<Word>(tokens), data<float>(out), batch, n, d);
  return out;
}

void masked_product_of(const Tensor& values, const Tensor& tokens, const Tensor& rows, const Tensor& start, const Tensor& out) {
  const int64_t batch = values.size(0), n = values.size(1), d = rows.size(1);
  expect_sizes(values, d);
  expect(tokens, batch, d, values.scalar_type());
  expect(rows, n, d, values.scalar_type());
  expect(out, batch, n, values.scalar_type());
  TORCH_CHECK(start.scalar_type() == values.scalar_type() && start.sizes() == values.sizes(), "start must be like the latents");
  if (is_half(values)) masked_product<true>(data<Half>(values), data<Word>(tokens), data<Word>(rows), start, data<Half>(out), batch, n, d / 2);
  else masked_product<false>(data<float>(values), data<Word>(tokens), data<Word>(rows), start, data<float>(out), batch, n, d);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("largest", &largest_of, release());
  module.def("decode", &decode_of, release());
  module.def("sum_tokens", &sum_tokens_of, release());
  module.def("masked_product", &masked_product_of, release());
}

// The k largest numbers of each row.
#pragma once
#include "lanes.h"

constexpr int64_t LOWEST = std::numeric_limits<int32_t>::min();  // a key below all

// A number as a whole one in the same order: a float's bits, or a bfloat16's in the upper half. What is not a number is above all.
template <typename Element>
inline int32_t in_order(Element value) {
  const int32_t b = bits(value);
  return (b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFFFFFF : b ^ (b >> 31 & 0x7FFFFFFF);
}

// which of as many numbers as a register holds are at least `least` in that order, of a bfloat16 its upper half
inline uint32_t at_least(const float* p, int64_t n, int32_t least) {
  const Words b = _mm512_maskz_loadu_epi32(first(n), p), all = _mm512_set1_epi32(0x7FFFFFFF), magnitude = _mm512_and_si512(b, all);
  const Words key = _mm512_xor_si512(b, _mm512_and_si512(_mm512_srai_epi32(b, 31), all));
  return first(n) & (_mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(least)) | _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000)));
}
inline uint32_t at_least(const Half* p, int64_t n, int32_t least) {
  const __mmask32 lanes = n < 2 * LANES ? (1u << n) - 1 : ~0u;
  const Words b = _mm512_maskz_loadu_epi16(lanes, p), all = _mm512_set1_epi16(0x7FFF), magnitude = _mm512_and_si512(b, all);
  const Words key = _mm512_xor_si512(b, _mm512_and_si512(_mm512_srai_epi16(b, 15), all));
  return lanes & (_mm512_cmpge_epi16_mask(key, _mm512_set1_epi16(least >> 16)) | _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7F80)));
}

// The numbers of one row that could be among its k largest: their keys and places.
struct Candidates {
  std::vector<uint16_t> masks;
  std::vector<int32_t> keys, places, chosen;
  int64_t count;

  Candidates(int64_t n) : masks(n / LANES + 2), keys(n + LANES), places(n + LANES), chosen(n + LANES) {}

  template <typename Element>
  void find(const Element* from, int64_t n, int32_t least) {
    constexpr int64_t each = sizeof(Words) / sizeof(Element);
    count = 0;
    for (int64_t i = 0; i < n; i += each) {
      const uint32_t mask = at_least(from + i, n - i, least);
      std::memcpy(&masks[i / LANES], &mask, each / 8);
      count += __builtin_popcount(mask);
    }
  }

  template <typename Element>
  void collect(const Element* from, int64_t n) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i += LANES) at += store(masks[i / LANES], _mm512_add_epi32(counting, _mm512_set1_epi32(i)), &places[at]);
    for (int64_t i = 0; i < count; i++) keys[i] = in_order(from[places[i]]);
  }

  // compressed in a register: compressing into memory is slow on some of these CPUs
  static int64_t store(__mmask16 mask, Words what, int32_t* where) {
    _mm512_storeu_si512(where, _mm512_maskz_compress_epi32(mask, what));
    return __builtin_popcount(mask);
  }

  // f(which of a register's keys compare so with `key`, where they begin) over all
  template <int comparison, typename F>
  void compare(int32_t key, F f) const {
    for (int64_t i = 0; i < count; i += LANES) f(_mm512_mask_cmp_epi32_mask(first(count - i), words(&keys[i]), _mm512_set1_epi32(key), comparison), i);
  }

  int64_t above(int32_t key) const {
    int64_t n = 0;
    compare<_MM_CMPINT_NLE>(key, [&](__mmask16 mask, int64_t) { n += __builtin_popcount(mask); });
    return n;
  }

  // Chooses k in order of place, those on the bar last, and says above which key they lie, or on it. Throughout, k or more lie above `low`, and fewer above `high`.
  int32_t choose(int64_t k, int64_t low) {
    int64_t high = *std::max_element(keys.begin(), keys.begin() + count), n = count;
    while (n != k && high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      n = above(middle);
      (n < k ? high : low) = middle;
    }
    const int32_t bar = n == k ? low : high;
    int64_t at = 0;
    auto take = [&](__mmask16 mask, int64_t i) { at += store(mask, words(&places[i]), &chosen[at]); };
    compare<_MM_CMPINT_NLE>(bar, take);
    if (at < k) compare<_MM_CMPINT_EQ>(bar, take);
    return bar;
  }
};

// The k-th largest differs little from token to token: what is above the last one, less a gap, is seldom more than 2 k numbers.
template <typename Element>
void largest(const Element* values, int64_t rows, int64_t n, int64_t k, Element* found, int32_t* places) {
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    Candidates candidates(n);
    int64_t least = LOWEST, gap = 1 << 20;
    for (int64_t row = begin; row < end; row++) {
      const Element* from = values + row * n;
      for (;; least = std::max(least - gap, LOWEST), gap *= 2) {
        candidates.find(from, n, least);
        if (candidates.count >= k) break;
      }
      if (candidates.count > 2 * k) gap = std::max<int64_t>(gap / 2, 1);
      candidates.collect(from, n);
      const int64_t bar = candidates.choose(k, std::max((least & ~0xFFFF) - 1, LOWEST));
      for (int64_t i = 0; i < k; i++) places[row * k + i] = candidates.chosen[i], found[row * k + i] = from[candidates.chosen[i]];
      least = std::max(bar - gap, LOWEST);
    }
  });
}

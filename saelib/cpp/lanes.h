// Sixteen words in a register of AVX-512. A word is 32 bits: a float, or two neighbours in bfloat16.
#pragma once
#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

using Floats = __m512;
using Words = __m512i;
using Word = uint32_t;
using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t LANES = 16;

inline __mmask16 first(int64_t n) { return n < LANES ? (1u << n) - 1 : 0xFFFF; }
const Words counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
inline Words words(const void* p) { return _mm512_loadu_si512(p); }

inline int32_t bits(float value) { int32_t out; std::memcpy(&out, &value, sizeof out); return out; }
inline int32_t bits(Half value) { return (int32_t)value << 16; }  // of the same number as a float

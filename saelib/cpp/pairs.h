// Products over pairs of tokens and latents, token by token or, where `order` and `token_of` say so, latent by latent.
#pragma once
#include "lanes.h"

constexpr int64_t GROUP = 4;  // pairs whose rows the first cache holds

// f(first word, which lanes) over a row of any length
template <typename F>
inline void over_row(int64_t d, F f) {
  int64_t c = 0;
  for (; c + LANES <= d; c += LANES) f(c, first(LANES));
  if (c < d) f(c, first(d - c));
}

inline Floats load(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }

// out_i = <row, others_i>
template <int count>
inline void dots(const float* row, const float* const* others, int64_t d, float* out) {
  Floats sum[count] = {};
  over_row(d, [&](int64_t c, __mmask16 lanes) {
    const Floats here = load(row + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) sum[i] = _mm512_fmadd_ps(here, load(others[i] + c, lanes), sum[i]);
  });
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) out[i] = _mm512_reduce_add_ps(sum[i]);
}

// out += Σ_i factors_i rows_i
template <int count>
inline void add_scaled(const float* factors, const float* const* rows, int64_t d, float* out) {
  over_row(d, [&](int64_t c, __mmask16 lanes) {
    Floats sum = load(out + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(factors[i]), load(rows[i] + c, lanes), sum);
    _mm512_mask_storeu_ps(out + c, lanes, sum);
  });
}

// f(a constant, the first pair) for as many pairs at once as the constant says
template <typename F>
inline void over_pairs(int64_t begin, int64_t end, F f) {
  for (; begin + GROUP <= end; begin += GROUP) f(std::integral_constant<int, GROUP>(), begin);
  for (; begin < end; begin++) f(std::integral_constant<int, 1>(), begin);
}

// out_p = <tokens of p, rows of p>, token by token
void dot(const float* tokens, const float* rows, const int32_t* latents, const int32_t* starts, float* out, int64_t batch, int64_t d) {
  at::parallel_for(0, batch, LANES, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      over_pairs(starts[b], starts[b + 1], [&](auto count, int64_t p) {
        const float* others[count];
        for (int64_t i = 0; i < count; i++) others[i] = rows + latents[p + i] * d;
        dots<count>(tokens + b * d, others, d, out + p);
      });
  });
}

// f(latent) for all, as many pairs to each thread
template <typename F>
void over_latents(const int32_t* starts, int64_t n, F f) {
  const int64_t parts = at::get_num_threads();
  auto cut = [&](int64_t part) { return part == parts ? n : std::lower_bound(starts, starts + n, part * starts[n] / parts) - starts; };
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t j = cut(from); j < cut(to); j++) f(j);
  });
}

// out_j = Σ_p factors_p tokens of p, over the pairs of a latent
void sum_tokens(const int32_t* order, const int32_t* token_of, const int32_t* starts, const float* factors, const float* tokens, float* out, int64_t n, int64_t d) {
  over_latents(starts, n, [&](int64_t j) {
    std::fill(out + j * d, out + (j + 1) * d, 0.f);
    over_pairs(starts[j], starts[j + 1], [&](auto count, int64_t p) {
      const float* rows[count];
      float here[count];
      for (int64_t i = 0; i < count; i++) rows[i] = tokens + token_of[p + i] * d, here[i] = factors[order[p + i]];
      add_scaled<count>(here, rows, d, out + j * d);
    });
  });
}

// The gradients of the latents and of their biases, and, while a token's row is in the first cache, of the decoder.
void gradients(const int32_t* order, const int32_t* token_of, const int32_t* starts, const float* values, const float* grad_values, const float* grad_out,
               const float* decoder, float* grad, float* grad_bias, float* grad_decoder, int64_t n, int64_t d) {
  over_latents(starts, n, [&](int64_t j) {
    float* into = grad_decoder + j * d;
    std::fill(into, into + d, 0.f), grad_bias[j] = 0;
    over_pairs(starts[j], starts[j + 1], [&](auto count, int64_t p) {
      const float* rows[count];
      float slopes[count], here[count];
      for (int64_t i = 0; i < count; i++) rows[i] = grad_out + token_of[p + i] * d;
      dots<count>(decoder + j * d, rows, d, slopes);
      for (int64_t i = 0; i < count; i++) {
        const int32_t pair = order[p + i];
        here[i] = values[pair];
        grad[pair] = here[i] > 0 ? slopes[i] + (grad_values ? grad_values[pair] : 0) : 0;
        grad_bias[j] += grad[pair];
      }
      add_scaled<count>(here, rows, d, into);
    });
  });
}

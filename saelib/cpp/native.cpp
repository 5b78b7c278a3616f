// What `saelib.native` compiles: checks of tensors, and the loops over what they hold.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>

#include "largest.h"
#include "pairs.h"
#include "zeros.h"

using at::Tensor;

template <typename T> T* data(const Tensor& tensor) { return (T*)tensor.data_ptr(); }
bool is_half(const Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

void expect(const Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.sizes() == at::IntArrayRef({rows, columns}),
              "a tensor is ", tensor.scalar_type(), tensor.sizes(), ": it must be ", type, " [", rows, ", ", columns, "], contiguous, on the CPU");
}

void expect_row(const Tensor& tensor, int64_t n, at::ScalarType type) { expect(tensor.unsqueeze(0), 1, n, type); }

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
  const int64_t down = start.stride(0), right = start.stride(1);
  if (is_half(values)) masked_product<true>(data<Half>(values), data<Word>(tokens), data<Word>(rows), data<Half>(start), down, right, data<Half>(out), batch, n, d / 2);
  else masked_product<false>(data<float>(values), data<Word>(tokens), data<Word>(rows), data<float>(start), down, right, data<float>(out), batch, n, d);
}

void expect_pairs(const Tensor& latents, const Tensor& starts, int64_t batch, int64_t n) {
  expect_row(latents, latents.numel(), at::kInt), expect_row(starts, batch + 1, at::kInt);
  const int32_t *latent = data<int32_t>(latents), *start = data<int32_t>(starts);
  TORCH_CHECK(start[0] == 0 && std::is_sorted(start, start + batch + 1) && start[batch] == latents.numel(), "starts must be numbers that rise from 0 to ", latents.numel());
  for (int64_t p = 0; p < latents.numel(); p++) TORCH_CHECK(0 <= latent[p] && latent[p] < n, "a latent is ", latent[p], ": it must be from 0 to ", n - 1);
}

// latents and where each token's begin -> the pairs in order of latent, their tokens, where each latent's begin
std::tuple<Tensor, Tensor, Tensor> group_of(const Tensor& latents, const Tensor& starts, int64_t n) {
  const int64_t pairs = latents.numel(), batch = starts.numel() - 1;
  expect_pairs(latents, starts, batch, n);
  const int32_t *latent = data<int32_t>(latents), *start = data<int32_t>(starts);
  Tensor order = at::empty({pairs}, latents.options()), tokens = at::empty({pairs}, latents.options()), begins = at::zeros({n + 1}, latents.options());
  int32_t* begin = data<int32_t>(begins);
  for (int64_t p = 0; p < pairs; p++) begin[latent[p] + 1]++;
  for (int64_t j = 0; j < n; j++) begin[j + 1] += begin[j];
  std::vector<int32_t> next(begin, begin + n);
  for (int64_t b = 0; b < batch; b++)
    for (int32_t p = start[b]; p < start[b + 1]; p++) {
      const int32_t place = next[latent[p]]++;
      data<int32_t>(order)[place] = p, data<int32_t>(tokens)[place] = b;
    }
  return {order, tokens, begins};
}

Tensor dot_of(const Tensor& tokens, const Tensor& rows, const Tensor& latents, const Tensor& starts) {
  const int64_t batch = tokens.size(0), d = tokens.size(1);
  expect(tokens, batch, d, at::kFloat), expect(rows, rows.size(0), d, at::kFloat), expect_pairs(latents, starts, batch, rows.size(0));
  Tensor out = at::empty({latents.numel()}, tokens.options());
  dot(data<float>(tokens), data<float>(rows), data<int32_t>(latents), data<int32_t>(starts), data<float>(out), batch, d);
  return out;
}

// for pairs that `group` has put in order
std::vector<Tensor> gradients_of(const Tensor& order, const Tensor& token_of, const Tensor& starts, const Tensor& values, const std::optional<Tensor>& grad_values,
                                 const Tensor& centred, const Tensor& grad_out, const Tensor& decoder) {
  const int64_t pairs = order.numel(), batch = centred.size(0), n = decoder.size(0), d = decoder.size(1);
  expect_row(order, pairs, at::kInt), expect_row(token_of, pairs, at::kInt), expect_row(starts, n + 1, at::kInt), expect_row(values, pairs, at::kFloat);
  if (grad_values) expect_row(*grad_values, pairs, at::kFloat);
  expect(centred, batch, d, at::kFloat), expect(grad_out, batch, d, at::kFloat), expect(decoder, n, d, at::kFloat);
  auto make = [&](at::IntArrayRef sizes) { return at::empty(sizes, values.options()); };
  Tensor grad = make({pairs}), grad_encoder = make({n, d}), grad_bias = make({n}), grad_decoder = make({n, d});
  const int32_t *ordered = data<int32_t>(order), *token = data<int32_t>(token_of), *begins = data<int32_t>(starts);
  gradients(ordered, token, begins, data<float>(values), grad_values ? data<float>(*grad_values) : nullptr, data<float>(grad_out), data<float>(decoder),
            data<float>(grad), data<float>(grad_bias), data<float>(grad_decoder), n, d);
  sum_tokens(ordered, token, begins, data<float>(grad), data<float>(centred), data<float>(grad_encoder), n, d);
  return {grad, grad_encoder, grad_bias, grad_decoder};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("largest", &largest_of, release());
  module.def("group", &group_of, release());
  module.def("dot", &dot_of, release());
  module.def("gradients", &gradients_of, release());
  module.def("decode", &decode_of, release());
  module.def("sum_tokens", &sum_tokens_of, release());
  module.def("masked_product", &masked_product_of, release());
}

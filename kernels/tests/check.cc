// Every processor path against the scalar one, bit for bit, and the scalar one against plain loops over unpacked weights, on random
// matrices, sparsities, tails, scales and options.   usage: check [cases] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "slimformer_kernels.h"

namespace {

std::mt19937 generator;
int below(int count) { return static_cast<int>(generator() % static_cast<unsigned>(count)); }
float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }
template <class T>
T one_of(std::initializer_list<T> items) { return items.begin()[below(static_cast<int>(items.size()))]; }

[[noreturn]] void wrong(long number, const std::string& what) {
  std::printf("case %ld: %s\n", number, what.c_str());
  std::exit(1);
}

// Tasks of a product run on three threads at once, or backwards in this one.
void on_threads(void*, void (*task)(void*, size_t), size_t count, void* user) {
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; t++)
    threads.emplace_back([=] {
      for (size_t i = t; i < count; i += 3) task(user, i);
    });
  for (auto& thread : threads) thread.join();
}
void backwards(void*, void (*task)(void*, size_t), size_t count, void* user) {
  while (count--) task(user, count);
}

struct Case {
  int64_t outputs, inputs, rows;
  int block_rows;
  std::vector<int8_t> weights;
  std::vector<float> scales, bias, x, x_scale, residual, gain, shift;
  std::vector<uint8_t> x_codes, x_zero;
  sfk_product product{};
};

Case draw() {
  Case c;
  const bool large = below(50) == 0;
  c.outputs = 1 + below(large ? 400 : 70), c.inputs = 1 + below(large ? 1600 : 150), c.rows = 1 + below(large ? 200 : 80);
  if (below(4) == 0) c.inputs = (c.inputs + 15) / 16 * 16;
  c.block_rows = one_of({0, 1, 1, 2, 4, 16});
  const float zeros = one_of({0.0f, 0.3f, 0.8f, 0.95f, 1.0f});
  c.weights.resize(static_cast<size_t>(c.outputs * c.inputs));
  const int height = c.block_rows ? c.block_rows : 1;
  const bool whole_blocks = below(3) > 0, extreme = below(4) == 0;
  for (int64_t n = 0; n < c.outputs; n += height)
    for (int64_t k = 0; k < c.inputs; k += 4) {
      const bool empty = whole_blocks && uniform(0, 1) < zeros;
      for (int64_t i = n; i < n + height && i < c.outputs; i++)
        for (int64_t j = k; j < k + 4 && j < c.inputs; j++) {
          int value = extreme ? one_of({-128, 127}) : below(256) - 128;
          if (empty || (!whole_blocks && uniform(0, 1) < zeros)) value = 0;
          c.weights[static_cast<size_t>(i * c.inputs + j)] = static_cast<int8_t>(value);
        }
    }
  auto fill = [](std::vector<float>& v, int64_t count, float low, float high) {
    v.resize(static_cast<size_t>(count));
    for (float& a : v) a = uniform(low, high);
  };
  fill(c.scales, c.outputs, 0.0f, one_of({0.01f, 1.0f}));
  fill(c.bias, c.outputs, -2.0f, 2.0f);
  const float size = one_of({1e-33f, 1e-3f, 1.0f, 50.0f, 1e20f});
  fill(c.x, c.rows * c.inputs, below(3) ? -size : 0.0f, size);
  if (below(5) == 0) c.x[static_cast<size_t>(below(static_cast<int>(c.x.size())))] *= 1000.0f;
  c.x_codes.resize(c.x.size());
  for (auto& code : c.x_codes) code = static_cast<uint8_t>(extreme ? 255 : below(256));
  c.product.per_row = below(2);
  fill(c.x_scale, c.rows, 0.001f, 0.1f);
  c.x_zero.resize(static_cast<size_t>(c.rows));
  for (auto& zero : c.x_zero) zero = static_cast<uint8_t>(below(256));
  fill(c.residual, c.rows * c.outputs, -3.0f, 3.0f);
  fill(c.gain, c.outputs, -2.0f, 2.0f), fill(c.shift, c.outputs, -1.0f, 1.0f);
  return c;
}

std::vector<unsigned char> packed(const Case& c, long number) {
  size_t bytes = 0;
  if (sfk_pack_size(c.block_rows, c.outputs, c.inputs, c.weights.data(), &bytes)) wrong(number, sfk_message());
  std::vector<unsigned char> to(bytes);
  if (sfk_pack(c.block_rows, c.outputs, c.inputs, c.weights.data(), c.scales.data(), c.bias.data(), to.data(), bytes))
    wrong(number, sfk_message());
  return to;
}

// One of the three kinds of results as bytes; guards around it must stay.
std::vector<unsigned char> run(const sfk_linear* linear, const Case& c, const sfk_product& product, int kind, long number) {
  const size_t count = static_cast<size_t>(c.rows * c.outputs), bytes = count * (kind == 2 ? 1 : 4);
  std::vector<unsigned char> result(bytes + 128, 0xcd);
  sfk_product p = product;
  void* to = result.data() + 64;
  if (kind == 0) p.y = static_cast<float*>(to);
  if (kind == 1) p.y_sums = static_cast<int32_t*>(to);
  if (kind == 2) p.y_codes = static_cast<uint8_t*>(to);
  if (sfk_multiply(linear, &p)) wrong(number, sfk_message());
  for (size_t i = 0; i < 64; i++)
    if (result[i] != 0xcd || result[64 + bytes + i] != 0xcd) wrong(number, "wrote beyond the result");
  return result;
}

void check_sums(const Case& c, const sfk_product& p, const std::vector<unsigned char>& result, long number) {
  for (int64_t row = 0; row < c.rows; row++)
    for (int64_t n = 0; n < c.outputs; n++) {
      int32_t sum = 0, got;
      const int zero = c.x_zero[static_cast<size_t>(p.per_row ? row : 0)];
      for (int64_t k = 0; k < c.inputs; k++)
        sum += c.weights[static_cast<size_t>(n * c.inputs + k)] * (c.x_codes[static_cast<size_t>(row * c.inputs + k)] - zero);
      std::memcpy(&got, result.data() + 64 + (row * c.outputs + n) * 4, 4);
      if (sum != got) wrong(number, "the scalar path differs from plain loops");
    }
}

void check_floats(const Case& c, const sfk_product& p, const std::vector<unsigned char>& result, long number) {
  // From codes, without norm and activation: a float product of the same integers, in double.
  for (int64_t row = 0; row < c.rows; row++)
    for (int64_t n = 0; n < c.outputs; n++) {
      double y = 0;
      const size_t at = static_cast<size_t>(p.per_row ? row : 0);
      for (int64_t k = 0; k < c.inputs; k++)
        y += c.weights[static_cast<size_t>(n * c.inputs + k)] * (c.x_codes[static_cast<size_t>(row * c.inputs + k)] - c.x_zero[at]);
      y = y * c.x_scale[at] * c.scales[static_cast<size_t>(n)] + c.bias[static_cast<size_t>(n)];
      if (p.activation == SFK_RELU) y = std::fmax(y, 0);
      if (p.activation == SFK_GELU) y = y * 0.5 * std::erfc(-y / std::sqrt(2.0));
      if (p.activation == SFK_GELU_TANH) y = y * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
      if (p.residual) y += c.residual[static_cast<size_t>(row * c.outputs + n)];
      float got;
      std::memcpy(&got, result.data() + 64 + (row * c.outputs + n) * 4, 4);
      if (!(std::fabs(got - y) <= 6e-5 + 2e-6 * std::fabs(y))) wrong(number, "a result is not the one of the formula");
    }
}

void one_case(long number, const std::vector<std::string>& paths) {
  Case c = draw();
  const std::vector<unsigned char> bytes = packed(c, number);
  sfk_linear* linear = nullptr;
  if (sfk_open(bytes.data(), bytes.size(), &linear)) wrong(number, sfk_message());
  sfk_product p = c.product;
  p.rows = c.rows;
  const bool codes = below(2);
  (codes ? p.x = nullptr : p.x = c.x.data());
  if (codes) p.x_codes = c.x_codes.data();
  if (codes || below(2)) p.x_scale = c.x_scale.data(), p.x_zero = c.x_zero.data();
  const int kind = below(3);
  if (kind != 1) {
    p.activation = below(4);
    if (below(2)) p.residual = c.residual.data();
    if (below(3) == 0) p.norm_gain = c.gain.data(), p.norm_shift = c.shift.data(), p.norm_epsilon = 1e-5f;
    p.y_scale = uniform(0.01f, 0.2f), p.y_zero = static_cast<uint8_t>(below(256));
  }
  sfk_set_path("scalar");
  const std::vector<unsigned char> expected = run(linear, c, p, kind, number);
  if (codes && kind == 1) check_sums(c, p, expected, number);
  if (codes && kind == 0 && !p.norm_gain) check_floats(c, p, expected, number);
  if (below(3) == 0) p.parallel = below(20) ? backwards : on_threads, p.threads = 1 + below(8);
  for (const std::string& path : paths) {
    sfk_set_path(path.c_str());
    if (run(linear, c, p, kind, number) != expected) {
      std::printf("%lld x %lld, %lld rows, blocks of %d, result %d, activation %d\n", static_cast<long long>(c.outputs),
                  static_cast<long long>(c.inputs), static_cast<long long>(c.rows), c.block_rows, kind, p.activation);
      wrong(number, "the path " + path + " differs from the scalar one");
    }
  }
  sfk_close(linear);
}

}  // namespace

int main(int count, char** arguments) {
  const long cases = count > 1 ? std::atol(arguments[1]) : 10000;
  generator.seed(count > 2 ? static_cast<unsigned>(std::atol(arguments[2])) : 1u);
  std::vector<std::string> paths;
  for (const char* name : {"avx512vnni", "avx512vnni256", "avxvnni", "avx2", "neon", "scalar"})
    if (sfk_set_path(name) == SFK_OK) paths.push_back(name);
  for (long number = 0; number < cases; number++) one_case(number, paths);
  std::printf("%ld cases agree on:", cases);
  for (const std::string& path : paths) std::printf(" %s", path.c_str());
  std::printf("\n");
}

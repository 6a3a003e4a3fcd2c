// Small random encoders: the same bits on every path, with and without threads, for every batch; and hostile files, which end in an
// error or in numbers. Run it under sanitizers.   usage: check_encoder [rounds] [seed]
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

using Bytes = std::vector<unsigned char>;

Bytes floats(size_t count, float middle) {
  std::vector<float> values(count);
  for (float& v : values) v = middle + static_cast<float>(below(2000) - 1000) * 1e-3f;
  Bytes bytes(count * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

Bytes matrix(int64_t outputs, int64_t inputs) {
  const int kinds[] = {0, 1, 2, 4, 16};
  const int rows = kinds[below(5)];
  std::vector<int8_t> weights(static_cast<size_t>(outputs * inputs));
  for (auto& w : weights) w = static_cast<int8_t>(below(3) ? 0 : below(255) - 127);
  std::vector<float> scales(static_cast<size_t>(outputs), 0.003f);
  size_t size = 0;
  sfk_pack_size(rows, outputs, inputs, weights.data(), &size);
  Bytes bytes(size);
  if (sfk_pack(rows, outputs, inputs, weights.data(), scales.data(), nullptr, bytes.data(), size)) std::abort();
  return bytes;
}

struct Sizes {
  int64_t layers, hidden, head_dim, vocabulary, positions, types;
};

constexpr uint32_t CODES = 4, INT8_POSITIONS = 8;

void sign(Bytes* file) {
  const uint64_t digest = sfk_digest(file->data(), file->size());
  std::memcpy(file->data() + 56, &digest, 8);
}

// The layout of src/encoder_file.cc.
Bytes encoder(const Sizes& s, uint32_t flags) {
  const auto count = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
  const auto any = [](size_t size, int most) {
    Bytes bytes(size);
    for (auto& b : bytes) b = static_cast<unsigned char>(below(most));
    return bytes;
  };
  Bytes words = any(count(s.vocabulary, s.hidden), 256), scales = floats(count(s.vocabulary, 1), 0.0f);
  if (flags & CODES) {
    int64_t parts = 1 + below(static_cast<int>(s.hidden));
    while (s.hidden % parts) parts--;
    const int entries = 1 + below(256);
    words = any(count(s.vocabulary, parts), entries), scales = floats(count(parts, entries), 0.0f);
    const Bytes pieces = any(count(entries, s.hidden), 256);
    scales.insert(scales.end(), pieces.begin(), pieces.end());
  }
  Bytes positions = floats(count(s.positions, flags & INT8_POSITIONS ? 1 : s.hidden), 0.0f);
  if (flags & INT8_POSITIONS) {
    const Bytes numbers = any(count(s.positions, s.hidden), 256);
    positions.insert(positions.end(), numbers.begin(), numbers.end());
  }
  std::vector<Bytes> sections = {words, scales, positions,
                                 floats(count(s.types, s.hidden), 0.0f), floats(count(2, s.hidden), 1.0f)};
  for (int64_t i = 0; i < s.layers; i++) {
    std::vector<Bytes> layer(7);
    if (below(5)) {
      const int64_t width = s.head_dim * (1 + below(3));
      layer[0] = matrix(width, s.hidden), layer[1] = matrix(2 * width, s.hidden), layer[2] = matrix(s.hidden, width);
      layer[3] = floats(count(2, s.hidden), 1.0f);
    }
    if (below(5)) {
      const int64_t width = 1 + below(90);
      layer[4] = matrix(width, s.hidden), layer[5] = matrix(s.hidden, width), layer[6] = floats(count(2, s.hidden), 1.0f);
    }
    sections.insert(sections.end(), layer.begin(), layer.end());
  }
  Bytes file(64 + 16 * sections.size());
  for (size_t i = 0; i < sections.size(); i++) {
    file.resize((file.size() + 63) / 64 * 64);
    const uint64_t place[2] = {sections[i].empty() ? 0 : file.size(), sections[i].size()};
    std::memcpy(file.data() + 64 + 16 * i, place, 16);
    file.insert(file.end(), sections[i].begin(), sections[i].end());
  }
  file.resize((file.size() + 63) / 64 * 64);
  const uint16_t small[2] = {static_cast<uint16_t>(flags >= CODES ? 2 : 1), static_cast<uint16_t>(1 + below(3))};
  const uint32_t numbers[6] = {static_cast<uint32_t>(s.layers),     static_cast<uint32_t>(s.hidden),    static_cast<uint32_t>(s.head_dim),
                               static_cast<uint32_t>(s.vocabulary), static_cast<uint32_t>(s.positions), static_cast<uint32_t>(s.types)};
  const float epsilon = 1e-6f;
  const uint32_t last[2] = {0, flags};
  const uint64_t bytes = file.size();
  std::memcpy(file.data(), "SLIMENCO", 8), std::memcpy(file.data() + 8, small, 4), std::memcpy(file.data() + 12, numbers, 24);
  std::memcpy(file.data() + 36, &epsilon, 4), std::memcpy(file.data() + 40, last, 8), std::memcpy(file.data() + 48, &bytes, 8);
  sign(&file);
  return file;
}

void on_threads(void*, void (*task)(void*, size_t), size_t count, void* user) {
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; t++)
    threads.emplace_back([=] {
      for (size_t i = t; i < count; i += 3) task(user, i);
    });
  for (auto& thread : threads) thread.join();
}

struct Texts {
  int64_t rows, columns;
  std::vector<int64_t> ids, mask, types;
};

std::vector<float> run(const sfk_encoder* e, const Texts& t, bool threads) {
  std::vector<float> hidden(static_cast<size_t>(t.rows * (sfk_encoder_first_only(e) ? 1 : t.columns) * sfk_encoder_hidden(e)), 7.0f);
  sfk_texts texts{};
  texts.rows = t.rows, texts.columns = t.columns, texts.ids = t.ids.data(), texts.mask = t.mask.data(), texts.types = t.types.data();
  texts.hidden = hidden.data();
  if (threads) texts.parallel = on_threads, texts.threads = 2 + below(4);
  if (sfk_encoder_run(e, &texts)) hidden.clear();
  return hidden;
}

}  // namespace

int main(int argc, char** arguments) {
  const long rounds = argc > 1 ? std::atol(arguments[1]) : 300;
  generator.seed(argc > 2 ? static_cast<unsigned>(std::atol(arguments[2])) : 1u);
  for (long round = 0; round < rounds; round++) {
    const Sizes s{below(4), 1 + below(70), 1 + below(20), 1 + below(40), 150, 1 + below(2)};
    Bytes file = encoder(s, static_cast<uint32_t>(below(16)));
    sfk_encoder* e = nullptr;
    if (sfk_encoder_open(file.data(), file.size(), &e)) {
      std::printf("round %ld: %s\n", round, sfk_message());
      return 1;
    }
    Texts t{1 + below(9), 1 + below(150), {}, {}, {}};
    const bool short_texts = below(2);
    for (int64_t row = 0; row < t.rows; row++) {
      const int64_t length = below(static_cast<int>(t.columns + 1));
      for (int64_t i = 0; i < t.columns; i++) {
        t.ids.push_back(below(static_cast<int>(s.vocabulary))), t.types.push_back(below(static_cast<int>(s.types)));
        t.mask.push_back(short_texts ? i < length : below(8) > 0);
      }
    }
    sfk_set_path("scalar");
    const std::vector<float> expected = run(e, t, false);
    if (expected.empty()) {
      std::printf("round %ld: %s\n", round, sfk_message());
      return 1;
    }
    for (const char* path : {"avx512vnni", "avx512vnni256", "avxvnni", "avx2", "neon", "scalar"}) {
      if (sfk_set_path(path) != SFK_OK) continue;
      for (const bool threads : {false, true})
        if (const auto got = run(e, t, threads); std::memcmp(got.data(), expected.data(), expected.size() * 4) != 0) {
          std::printf("round %ld: the path %s, %s threads, differs\n", round, path, threads ? "with" : "without");
          return 1;
        }
    }
    sfk_encoder_close(e);
    for (int change = 0; change < 20; change++) {
      Bytes bad = file;
      const size_t end = below(3) ? 64 + 16 * static_cast<size_t>(5 + 7 * s.layers) : bad.size();
      for (int i = 0; i <= below(3); i++) bad[static_cast<size_t>(below(static_cast<int>(end)))] = static_cast<unsigned char>(below(256));
      if (below(6) == 0) bad.resize(static_cast<size_t>(below(static_cast<int>(bad.size()))));
      if (bad.size() >= 64) sign(&bad);
      if (sfk_encoder_open(bad.data(), bad.size(), &e) != SFK_OK) continue;
      if (sfk_encoder_hidden(e) == s.hidden) run(e, t, false);
      sfk_encoder_close(e);
    }
  }
  std::printf("%ld encoders agree, their damaged copies did no harm\n", rounds);
}

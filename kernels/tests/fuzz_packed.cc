// Damaged and hostile packed bytes: they end in an error or in numbers, never in a read out of bounds. With -DLIBFUZZER this is a
// target of libFuzzer; else a program that changes sound files at random: fuzz_packed [rounds] [seed]. Run it under sanitizers.
#include "../src/packed.cc"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

void try_bytes(const unsigned char* data, size_t size) {
  // An own block of just this size, so that the address sanitizer sees one byte too many.
  std::vector<unsigned char> bytes(data, data + size);
  sfk_linear* linear = nullptr;
  if (sfk_open(bytes.data(), bytes.size(), &linear) != SFK_OK) return;
  const int64_t work = linear->outputs * linear->inputs;
  if (work < (1 << 22)) {
    std::vector<float> x(static_cast<size_t>(3 * linear->inputs), 1.0f), y(static_cast<size_t>(3 * linear->outputs));
    sfk_product p{};
    p.rows = 3, p.x = x.data(), p.y = y.data();
    if (sfk_multiply(linear, &p) != SFK_OK) std::abort();
  }
  sfk_close(linear);
}

// As an attacker would: the digest agrees with the changed bytes.
void try_signed(std::vector<unsigned char> bytes) {
  if (bytes.size() >= sizeof(Header)) {
    uint64_t digest = digest_of(bytes.data(), bytes.size());
    std::memcpy(bytes.data() + offsetof(Header, digest), &digest, 8);
  }
  try_bytes(bytes.data(), bytes.size());
}

}  // namespace

#ifdef LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try_bytes(data, size);
  try_signed(std::vector<unsigned char>(data, data + size));
  return 0;
}
#else
int main(int count, char** arguments) {
  const long rounds = count > 1 ? std::atol(arguments[1]) : 20000;
  std::mt19937 generator(count > 2 ? static_cast<unsigned>(std::atol(arguments[2])) : 1u);
  auto below = [&generator](size_t most) { return static_cast<size_t>(generator() % (most ? most : 1)); };
  long refused = 0;
  for (long round = 0; round < rounds; round++) {
    const int block_rows[] = {0, 1, 2, 4, 16};
    const int rows = block_rows[below(5)];
    const int64_t outputs = 1 + static_cast<int64_t>(below(40)), inputs = 1 + static_cast<int64_t>(below(40));
    std::vector<int8_t> weights(static_cast<size_t>(outputs * inputs));
    for (auto& w : weights) w = static_cast<int8_t>(below(3) ? 0 : below(256));
    std::vector<float> scales(static_cast<size_t>(outputs), 0.5f);
    size_t size = 0;
    sfk_pack_size(rows, outputs, inputs, weights.data(), &size);
    std::vector<unsigned char> bytes(size);
    if (sfk_pack(rows, outputs, inputs, weights.data(), scales.data(), nullptr, bytes.data(), size)) std::abort();
    sfk_linear* sound = nullptr;
    if (sfk_open(bytes.data(), size, &sound)) std::abort();
    sfk_close(sound);
    const uint32_t tempting[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xffff, 65537};
    for (size_t change = 1 + below(3); change--;) {
      const size_t at = below(2) ? below(64) : below(size);
      if (below(3) == 0 && at + 4 <= size)
        std::memcpy(bytes.data() + at, &tempting[below(7)], 4);
      else
        bytes[at] = static_cast<unsigned char>(below(256));
    }
    if (below(6) == 0) bytes.resize(below(size + 1));
    if (below(12) == 0) bytes.resize(bytes.size() + 64);
    try_bytes(bytes.data(), bytes.size());
    try_signed(bytes);
    refused++;
  }
  std::printf("%ld changed files did no harm\n", refused);
}
#endif

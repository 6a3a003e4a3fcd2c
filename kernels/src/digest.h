// A digest against damage, not against forgers: files of packed bytes carry it in their header.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

// Of all whole words of 8 bytes, with 0 in the place of the word at `skip`, where the digest itself lies.
inline uint64_t digest(const void* bytes, size_t count, size_t skip) {
  const unsigned char* at = static_cast<const unsigned char*>(bytes);
  uint64_t h = 0x9e3779b97f4a7c15u;
  for (size_t i = 0; i + 8 <= count; i += 8) {
    uint64_t word = 0;
    if (i != skip) std::memcpy(&word, at + i, 8);
    h = (h ^ word) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  return h;
}

// A checked view of one packed encoder. The format: see encoder_file.cc.
#pragma once
#include <cstdint>
#include <vector>

#include "packed.h"

struct Norm {
  const float* gain = nullptr;
  const float* shift = nullptr;
};

// A sublayer that was cut has no matrices: what comes in goes out.
struct Layer {
  sfk_linear *query = nullptr, *key_value = nullptr, *out = nullptr, *into = nullptr, *down = nullptr;
  Norm attention_norm, ffn_norm;
  int heads = 0;
};

struct sfk_encoder {
  int64_t hidden, head_dim, vocabulary, positions, types;
  int64_t first_position;
  bool first_only;         // only the hidden state of the first column is wanted
  bool positions_by_id;    // positions count the ids that are no padding, not columns
  int activation;
  float epsilon;
  const int8_t* words;       // [vocabulary][hidden], or null
  const float* word_scale;   // [vocabulary], or null
  const uint8_t* codes;      // in the place of words: [vocabulary][parts], each the entry of a piece; or null
  const int8_t* book;        // [parts][entries][hidden / parts]
  const float* book_scale;   // [parts][entries]
  int64_t parts, entries;
  const float* position;     // [positions][hidden]
  const float* type;         // [types][hidden], or null
  Norm embedding_norm;
  std::vector<Layer> layers;
  int64_t widest = 0;  // inputs of the widest matrix
  void* copy = nullptr;
  float* unpacked = nullptr;  // positions that were stored in int8
};

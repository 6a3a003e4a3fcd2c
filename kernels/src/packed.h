// A checked view of one packed matrix, as the kernels read it. The format: see packed.cc.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int PANEL = 16;  // outputs that are computed together

struct sfk_linear {
  int64_t outputs, inputs;
  int64_t quads;         // groups of 4 inputs, the last one filled up with zeros
  int64_t panels;        // groups of 16 outputs, likewise
  int block_rows;        // 0: dense
  int64_t blocks;
  const float* scale;    // [panels * 16], as bias and sum
  const float* bias;
  const int32_t* sum;    // of each output's weights
  const int32_t* starts;     // [panels * 16 / block_rows + 1]: the first block of each row of blocks
  const uint16_t* columns;   // [blocks]: which quad of inputs
  const int8_t* values;      // dense: [panels][quads][16][4]; else [blocks][block_rows][4]
};

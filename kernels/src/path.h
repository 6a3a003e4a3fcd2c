// What each processor path provides. Activations come in tiles: `width` tokens (16, 32, 48 or 64) side by side, one for each vector
// lane. A float tile is [features][width], a tile of codes [quads][width][4]: four inputs of a token in one 32-bit lane.
#pragma once
#include <cstdint>

#include "packed.h"

constexpr int MAX_WIDTH = 64;

// What becomes of the sums of a panel: y = activation((sum - zero * weights' sum) * (x scale * w scale) + bias) + residual.
struct Finish {
  const float* x_scale;    // [width]
  const int32_t* x_zero;   // [width]
  int activation;
  const float* residual;   // tile [outputs][width] or null
  float* low;              // [width]: running extremes of y, or null
  float* high;
};

struct Path {
  const char* name;
  // sums[16][width] of one panel of outputs
  void (*accumulate)(const sfk_linear&, int64_t panel, const uint8_t* codes, int width, int32_t* sums);
  // out: [16][width], where the panel begins; so is the residual
  void (*finish)(const sfk_linear&, int64_t panel, const int32_t* sums, int width, const Finish&, float* out);
  void (*finish_sums)(const sfk_linear&, int64_t panel, int32_t* sums, int width, const int32_t* x_zero);
  // From extremes to the grid: low and high of each lane become scale and zero.
  void (*grid)(const float* low, const float* high, int width, float* scale, int32_t* zero);
  // Of `lanes` tokens (a multiple of 16) of a tile; codes begin where those tokens do.
  void (*quantize)(const float* tile, int64_t features, int width, int lanes, const float* scale, const int32_t* zero,
                   uint8_t* codes);
  void (*range)(const float* tile, int64_t features, int width, int lanes, float* low, float* high);
  void (*quantize_row)(const float* row, int64_t count, float scale, int32_t zero, uint8_t* codes);
  void (*range_row)(const float* row, int64_t count, float* low, float* high);
  // Over the features of each token, in place; low and high: the extremes of the result, 0 among them, or null.
  void (*layer_norm)(float* tile, int64_t features, int width, int lanes, const float* gain, const float* shift, float epsilon,
                     float* low, float* high);
  // One head of one sequence: q, k and v are [head_dim][width], `keys` tokens wide; q is scaled so that 2^(q k) are the weights.
  // `lanes` queries (16 to 64) at a time; scores: room for [keys][lanes]; out: [head_dim][lanes].
  void (*attend)(const float* q, int q_width, const float* k, const float* v, int kv_width, int head_dim, int keys, int lanes,
                 float* scores, float* out);
  // y = codes * scale + position (+ type, unless null)
  void (*embed)(const int8_t* codes, float scale, const float* position, const float* type, int64_t count, float* y);
  void (*copy)(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int count);
  // to[j][i] = from[i][j] for 32-bit items
  void (*transpose)(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns);
  double (*peak)(long rounds);  // operations done by `rounds` rounds of dot products in registers
};

const Path* path_in_use();  // null, with a message, if the one asked for cannot run here

extern const Path SCALAR_PATH;
#if defined(__x86_64__)
extern const Path AVX2_PATH, AVXVNNI_PATH, AVX512VNNI256_PATH, AVX512VNNI_PATH;
#elif defined(__aarch64__)
extern const Path NEON_PATH;
#endif

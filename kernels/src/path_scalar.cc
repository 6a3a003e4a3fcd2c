// The reference: what every other path must give bit for bit, in plain loops. It says what is computed; kernels.inc says how fast.
#include <cmath>
#include <cstring>

#include "constants.h"
#include "path.h"

namespace {

float least(float a, float b) { return a < b ? a : b; }
float most(float a, float b) { return a > b ? a : b; }

void accumulate(const sfk_linear& w, int64_t panel, const uint8_t* codes, int width, int32_t* sums) {
  const int block_rows = w.block_rows ? w.block_rows : PANEL;
  for (int r = 0; r < PANEL; r++)
    for (int t = 0; t < width; t++) {
      int64_t group = (panel * PANEL + r) / block_rows;
      int64_t first = w.block_rows ? w.starts[group] : panel * w.quads;
      int64_t end = w.block_rows ? w.starts[group + 1] : first + w.quads;
      int32_t sum = 0;
      for (int64_t b = first; b < end; b++) {
        const int8_t* four = w.values + (b * block_rows + r % block_rows) * 4;
        const uint8_t* x = codes + ((w.block_rows ? w.columns[b] : b - first) * width + t) * 4;
        for (int j = 0; j < 4; j++) sum += four[j] * x[j];
      }
      sums[r * width + t] = sum;
    }
}

float gelu(float x, const float* term) {
  float u = most(GELU_END - std::fabs(x), 0.0f);
  float q = term[GELU_TERMS - 1];
  for (int i = GELU_TERMS - 2; i >= 0; i--) q = std::fmaf(q, u, term[i]);
  return std::fmaf(0.0f - u, q, most(x, 0.0f));
}

int32_t real_sum(const sfk_linear& w, int64_t output, int32_t sum, int32_t zero) { return sum - zero * w.sum[output]; }

void finish(const sfk_linear& w, int64_t panel, const int32_t* sums, int width, const Finish& f, float* out) {
  for (int r = 0; r < PANEL; r++)
    for (int t = 0; t < width; t++) {
      const int64_t n = panel * PANEL + r;
      const int32_t sum = real_sum(w, n, sums[r * width + t], f.x_zero[t]);
      float y = std::fmaf(static_cast<float>(sum), f.x_scale[t] * w.scale[n], w.bias[n]);
      if (f.activation == 1) y = most(y, 0.0f);
      if (f.activation >= 2) y = gelu(y, GELU_TERM[f.activation - 2]);
      if (f.residual && n < w.outputs) y += f.residual[r * width + t];
      out[r * width + t] = y;
      if (f.low && n < w.outputs) f.low[t] = least(f.low[t], y), f.high[t] = most(f.high[t], y);
    }
}

void finish_sums(const sfk_linear& w, int64_t panel, int32_t* sums, int width, const int32_t* x_zero) {
  for (int i = 0; i < PANEL * width; i++) sums[i] = real_sum(w, panel * PANEL + i / width, sums[i], x_zero[i % width]);
}

void grid(const float* low, const float* high, int width, float* scale, int32_t* zero) {
  for (int t = 0; t < width; t++) {
    float least_one = least(low[t], 0.0f);
    float s = (most(high[t], 0.0f) - least_one) / 255.0f;
    scale[t] = s > LEAST_SCALE ? s : 1.0f;
    zero[t] = static_cast<int32_t>(std::lrintf(most(least((0.0f - least_one) / scale[t], 255.0f), 0.0f)));
  }
}

uint8_t code_of(float x, float scale, int32_t zero) {
  float code = std::fmaf(x, 1.0f / scale, static_cast<float>(zero));
  return static_cast<uint8_t>(std::lrintf(most(least(code, 255.0f), 0.0f)));
}

void quantize(const float* tile, int64_t features, int width, int lanes, const float* scale, const int32_t* zero,
              uint8_t* codes) {
  for (int64_t k = 0; k < (features + 3) / 4 * 4; k++)
    for (int t = 0; t < lanes; t++)
      codes[(k / 4 * width + t) * 4 + k % 4] = k < features ? code_of(tile[k * width + t], scale[t], zero[t]) : uint8_t{0};
}

void range(const float* tile, int64_t features, int width, int lanes, float* low, float* high) {
  for (int t = 0; t < lanes; t++) {
    low[t] = high[t] = 0.0f;
    for (int64_t k = 0; k < features; k++)
      low[t] = least(low[t], tile[k * width + t]), high[t] = most(high[t], tile[k * width + t]);
  }
}

void quantize_row(const float* row, int64_t count, float scale, int32_t zero, uint8_t* codes) {
  for (int64_t i = 0; i < count; i++) codes[i] = code_of(row[i], scale, zero);
}

void range_row(const float* row, int64_t count, float* low, float* high) {
  *low = *high = 0.0f;
  for (int64_t i = 0; i < count; i++) *low = least(*low, row[i]), *high = most(*high, row[i]);
}

void layer_norm(float* tile, int64_t features, int width, int lanes, const float* gain, const float* shift, float epsilon,
                float* low, float* high) {
  for (int t = 0; t < lanes; t++) {
    float* at = tile + t;
    const float count = static_cast<float>(features);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t k = 0; k < features; k++) sum += at[k * width];
    const float mean = sum / count;
    for (int64_t k = 0; k < features; k++) squares = std::fmaf(at[k * width] - mean, at[k * width] - mean, squares);
    const float inverse = 1.0f / std::sqrt(squares / count + epsilon);
    float least_one = 0.0f, most_one = 0.0f;
    for (int64_t k = 0; k < features; k++) {
      float y = std::fmaf((at[k * width] - mean) * inverse, gain[k], shift[k]);
      least_one = least(least_one, y), most_one = most(most_one, y);
      at[k * width] = y;
    }
    if (low) low[t] = least_one, high[t] = most_one;
  }
}

void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) std::memcpy(to + j * to_stride + i, from + i * from_stride + j, 4);
}

float power_of_two(float x) {
  x = most(x, EXP2_LEAST);
  const int32_t whole = static_cast<int32_t>(std::lrintf(x));
  const float f = x - static_cast<float>(whole);
  float y = EXP2_TERM[EXP2_TERMS - 1];
  for (int i = EXP2_TERMS - 2; i >= 0; i--) y = std::fmaf(y, f, EXP2_TERM[i]);
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  bits += static_cast<uint32_t>(whole) << 23;
  std::memcpy(&y, &bits, 4);
  return y;
}

void attend(const float* q, int q_width, const float* k, const float* v, int kv_width, int head_dim, int keys, int lanes,
            float* scores, float* out) {
  for (int t = 0; t < lanes; t++) {
    float top = 0.0f, sum = 0.0f;
    for (int j = 0; j < keys; j++) {
      float score = 0.0f;
      for (int d = 0; d < head_dim; d++) score = std::fmaf(q[d * q_width + t], k[d * kv_width + j], score);
      scores[j * lanes + t] = score;
      top = j ? most(top, score) : score;
    }
    for (int j = 0; j < keys; j++) sum += scores[j * lanes + t] = power_of_two(scores[j * lanes + t] - top);
    for (int d = 0; d < head_dim; d++) {
      float y = 0.0f;
      for (int j = 0; j < keys; j++) y = std::fmaf(scores[j * lanes + t], v[d * kv_width + j], y);
      out[d * lanes + t] = y * (1.0f / sum);
    }
  }
}

void embed(const int8_t* codes, float scale, const float* position, const float* type, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i++) y[i] = std::fmaf(codes[i], scale, type ? position[i] + type[i] : position[i]);
}

void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int count) {
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < count; i++) to[r * to_stride + i] = from[r * from_stride + i];
}

double peak(long rounds) {
  int32_t sum = 0;
  for (long k = 0; k < rounds; k++) {
    sum += 3;
    asm volatile("" : "+r"(sum));
  }
  return 2.0 * static_cast<double>(rounds);
}

}  // namespace

const Path SCALAR_PATH = {"scalar", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                          layer_norm, attend, embed, copy, transpose, peak};

// The packed format, version 1, little-endian; every section begins at a multiple of 64 bytes and is filled up with zeros.
//
//   header   64 bytes: "SLIMKERN", u16 version, u16 block_rows, u32 0, u32 outputs, u32 inputs, u64 blocks, u64 bytes of all,
//            u64 digest of all (taken with 0 in its place), 16 bytes 0
//   scale    f32 [panels * 16]   panels = outputs / 16, rounded up; zeros beyond the outputs, here and below
//   bias     f32 [panels * 16]
//   sum      i32 [panels * 16]   of each output's weights
//   starts   i32 [panels * 16 / block_rows + 1]   sparse only: the first block of each row of blocks
//   columns  u16 [blocks]                         sparse only: the quad of inputs of each block, rising within a row
//   values   i8  dense: [panels][quads][16][4], quads = inputs / 4, rounded up; sparse: [blocks][block_rows][4]
//
// `open` believes nothing: sizes follow from the header and must agree with the bytes given; starts, columns and sums are checked
// one by one. What is left to a liar is wrong numbers, not a read out of bounds.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "digest.h"
#include "packed.h"
#include "status.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed format is read in place, which needs a little-endian processor"
#endif

namespace {

constexpr char MAGIC[8] = {'S', 'L', 'I', 'M', 'K', 'E', 'R', 'N'};
constexpr uint16_t VERSION = 1;
constexpr size_t ALIGN = 64;
// A sum of 65,536 products of a u8 and an s8 still fits 32 bits.
constexpr int64_t MOST_INPUTS = 65536, MOST_OUTPUTS = 1 << 20, MOST_BLOCKS = int64_t{1} << 31;

struct Header {
  char magic[8];
  uint16_t version, block_rows;
  uint32_t zero;
  uint32_t outputs, inputs;
  uint64_t blocks, bytes, digest;
  uint64_t zeros[2];
};
static_assert(sizeof(Header) == 64, "the header has no gaps");

constexpr size_t round_up(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

struct Sections {
  size_t scale, bias, sum, starts, columns, values, end;
};

Sections sections_of(const sfk_linear& m) {
  Sections at{};
  const size_t padded = static_cast<size_t>(m.panels) * PANEL, blocks = static_cast<size_t>(m.blocks);
  at.scale = sizeof(Header);
  at.bias = at.scale + padded * 4;
  at.sum = at.bias + padded * 4;
  at.starts = at.sum + padded * 4;
  if (m.block_rows == 0) {
    at.columns = at.values = at.starts;
    at.end = at.values + round_up(padded * static_cast<size_t>(m.quads) * 4);
  } else {
    at.columns = at.starts + round_up((padded / static_cast<size_t>(m.block_rows) + 1) * 4);
    at.values = at.columns + round_up(blocks * 2);
    at.end = at.values + round_up(blocks * static_cast<size_t>(m.block_rows) * 4);
  }
  return at;
}

// The sizes of a matrix, or why there is none.
sfk_status measure(int block_rows, int64_t outputs, int64_t inputs, sfk_linear* m) {
  if (block_rows != 0 && block_rows != 1 && block_rows != 2 && block_rows != 4 && block_rows != 16)
    return fail(SFK_BAD_ARGUMENT, "blocks have 1, 2, 4 or 16 rows (0: dense), not %d", block_rows);
  if (outputs < 1 || outputs > MOST_OUTPUTS || inputs < 1 || inputs > MOST_INPUTS)
    return fail(SFK_BAD_ARGUMENT, "a matrix has 1 to %lld outputs and 1 to %lld inputs, not %lld and %lld",
                static_cast<long long>(MOST_OUTPUTS), static_cast<long long>(MOST_INPUTS), static_cast<long long>(outputs),
                static_cast<long long>(inputs));
  *m = {};
  m->outputs = outputs, m->inputs = inputs, m->block_rows = block_rows;
  m->quads = (inputs + 3) / 4, m->panels = (outputs + PANEL - 1) / PANEL;
  return SFK_OK;
}

uint64_t digest_of(const void* bytes, size_t count) { return digest(bytes, count, offsetof(Header, digest)); }

// The four weights of one output and one quad, with zeros beyond the matrix.
void four_of(const sfk_linear& m, const int8_t* weights, int64_t output, int64_t quad, int8_t four[4]) {
  for (int64_t j = 0; j < 4; j++) {
    int64_t input = quad * 4 + j;
    four[j] = output < m.outputs && input < m.inputs ? weights[output * m.inputs + input] : int8_t{0};
  }
}

bool block_is_zero(const sfk_linear& m, const int8_t* weights, int64_t row, int64_t quad) {
  for (int r = 0; r < m.block_rows; r++) {
    int8_t four[4];
    four_of(m, weights, row * m.block_rows + r, quad, four);
    if (four[0] || four[1] || four[2] || four[3]) return false;
  }
  return true;
}

void count_blocks(sfk_linear* m, const int8_t* weights) {
  if (m->block_rows == 0) return;
  for (int64_t row = 0; row < m->panels * PANEL / m->block_rows; row++)
    for (int64_t quad = 0; quad < m->quads; quad++) m->blocks += !block_is_zero(*m, weights, row, quad);
}

// The sum of each output's stored weights must be the one in the file; m.values and the like are set.
bool sums_agree(const sfk_linear& m) {
  for (int64_t n = 0; n < m.panels * PANEL; n++) {
    int64_t row = m.block_rows ? n / m.block_rows : 0;
    int64_t first = m.block_rows ? m.starts[row] : n / PANEL * m.quads;
    int64_t end = m.block_rows ? m.starts[row + 1] : first + m.quads;
    int rows = m.block_rows ? m.block_rows : PANEL;
    int64_t sum = 0;
    for (int64_t b = first; b < end; b++)
      for (int j = 0; j < 4; j++) sum += m.values[(b * rows + n % rows) * 4 + j];
    if (sum != m.sum[n]) return false;
  }
  return true;
}

template <class T>
T* at(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(base) + offset);
}

}  // namespace

struct Opened : sfk_linear {
  void* copy = nullptr;  // where the bytes given were not aligned
};

extern "C" {

sfk_status sfk_pack_size(int block_rows, int64_t outputs, int64_t inputs, const int8_t* weights, size_t* bytes) {
  sfk_linear m;
  if (!weights || !bytes) return fail(SFK_BAD_ARGUMENT, "weights and bytes must be given");
  if (sfk_status status = measure(block_rows, outputs, inputs, &m)) return status;
  count_blocks(&m, weights);
  if (m.blocks >= MOST_BLOCKS) return fail(SFK_BAD_ARGUMENT, "too many blocks: %lld", static_cast<long long>(m.blocks));
  *bytes = sections_of(m).end;
  return SFK_OK;
}

sfk_status sfk_pack(int block_rows, int64_t outputs, int64_t inputs, const int8_t* weights, const float* scales, const float* bias,
                    void* packed, size_t bytes) {
  sfk_linear m;
  if (!weights || !scales || !packed) return fail(SFK_BAD_ARGUMENT, "weights, scales and packed must be given");
  if (sfk_status status = measure(block_rows, outputs, inputs, &m)) return status;
  count_blocks(&m, weights);
  const Sections to = sections_of(m);
  if (bytes != to.end) return fail(SFK_BAD_ARGUMENT, "%zu bytes are given, the matrix takes %zu", bytes, to.end);
  if (reinterpret_cast<uintptr_t>(packed) % 4) return fail(SFK_BAD_ARGUMENT, "packed must be aligned to 4 bytes");
  std::memset(packed, 0, bytes);
  for (int64_t n = 0; n < outputs; n++) {
    if (!std::isfinite(scales[n]) || (bias && !std::isfinite(bias[n])))
      return fail(SFK_BAD_ARGUMENT, "the scale or bias of output %lld is no finite number", static_cast<long long>(n));
    at<float>(packed, to.scale)[n] = scales[n];
    at<float>(packed, to.bias)[n] = bias ? bias[n] : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs; k++) sum += weights[n * inputs + k];
    at<int32_t>(packed, to.sum)[n] = sum;
  }
  int8_t* values = at<int8_t>(packed, to.values);
  if (block_rows == 0) {
    for (int64_t panel = 0; panel < m.panels; panel++)
      for (int64_t quad = 0; quad < m.quads; quad++)
        for (int r = 0; r < PANEL; r++, values += 4) four_of(m, weights, panel * PANEL + r, quad, values);
  } else {
    int32_t* starts = at<int32_t>(packed, to.starts);
    uint16_t* columns = at<uint16_t>(packed, to.columns);
    int32_t block = 0;
    for (int64_t row = 0; row < m.panels * PANEL / block_rows; row++) {
      starts[row] = block;
      for (int64_t quad = 0; quad < m.quads; quad++) {
        if (block_is_zero(m, weights, row, quad)) continue;
        columns[block++] = static_cast<uint16_t>(quad);
        for (int r = 0; r < block_rows; r++, values += 4) four_of(m, weights, row * block_rows + r, quad, values);
      }
    }
    starts[m.panels * PANEL / block_rows] = block;
  }
  Header header{};
  std::memcpy(header.magic, MAGIC, sizeof MAGIC);
  header.version = VERSION, header.block_rows = static_cast<uint16_t>(block_rows);
  header.outputs = static_cast<uint32_t>(outputs), header.inputs = static_cast<uint32_t>(inputs);
  header.blocks = static_cast<uint64_t>(m.blocks), header.bytes = bytes;
  std::memcpy(packed, &header, sizeof header);
  header.digest = digest_of(packed, bytes);
  std::memcpy(packed, &header, sizeof header);
  return SFK_OK;
}

sfk_status sfk_open(const void* packed, size_t bytes, sfk_linear** linear) {
  if (!packed || !linear) return fail(SFK_BAD_ARGUMENT, "packed and linear must be given");
  *linear = nullptr;
  Header header;
  if (bytes < sizeof header) return fail(SFK_BAD_FILE, "%zu bytes are too few for a packed matrix", bytes);
  std::memcpy(&header, packed, sizeof header);
  if (std::memcmp(header.magic, MAGIC, sizeof MAGIC) != 0) return fail(SFK_BAD_FILE, "these bytes are no packed matrix");
  if (header.version > VERSION)
    return fail(SFK_NEWER_FILE, "the matrix is packed in format %d; this library (%s) reads up to %d: install a newer slimformer-kernels",
                header.version, SFK_VERSION, VERSION);
  Opened m;
  if (header.version != VERSION || header.zero || header.zeros[0] || header.zeros[1] ||
      measure(header.block_rows, header.outputs, header.inputs, &m) != SFK_OK)
    return fail(SFK_BAD_FILE, "the header of the packed matrix makes no sense");
  const uint64_t most = static_cast<uint64_t>(m.block_rows ? m.panels * PANEL / m.block_rows * m.quads : 0);
  if (header.blocks > most || header.blocks >= static_cast<uint64_t>(MOST_BLOCKS))
    return fail(SFK_BAD_FILE, "the packed matrix claims %llu blocks", static_cast<unsigned long long>(header.blocks));
  m.blocks = static_cast<int64_t>(header.blocks);
  const Sections from = sections_of(m);
  if (header.bytes != from.end || bytes != from.end)
    return fail(SFK_BAD_FILE, "the packed matrix should have %zu bytes and has %zu", from.end, bytes);
  if (digest_of(packed, bytes) != header.digest)
    return fail(SFK_BAD_FILE, "the digest of the packed matrix does not agree: the file is damaged");

  const void* base = packed;
  if (reinterpret_cast<uintptr_t>(packed) % ALIGN) {
    m.copy = std::aligned_alloc(ALIGN, bytes);
    if (!m.copy) return fail(SFK_NO_MEMORY, "no memory for %zu bytes", bytes);
    std::memcpy(m.copy, packed, bytes);
    base = m.copy;
  }
  void* all = const_cast<void*>(base);  // only to share at(); nothing is written
  m.scale = at<float>(all, from.scale), m.bias = at<float>(all, from.bias), m.sum = at<int32_t>(all, from.sum);
  m.values = at<int8_t>(all, from.values);
  bool sound = true;
  for (int64_t n = 0; n < m.panels * PANEL; n++) sound = sound && std::isfinite(m.scale[n]) && std::isfinite(m.bias[n]);
  if (m.block_rows) {
    m.starts = at<int32_t>(all, from.starts), m.columns = at<uint16_t>(all, from.columns);
    const int64_t rows = m.panels * PANEL / m.block_rows;
    sound = sound && m.starts[0] == 0 && m.starts[rows] == m.blocks;
    for (int64_t row = 0; sound && row < rows; row++) {
      sound = m.starts[row] <= m.starts[row + 1] && m.starts[row + 1] <= m.blocks;
      for (int64_t b = m.starts[row]; sound && b < m.starts[row + 1]; b++)
        sound = m.columns[b] < m.quads && (b == m.starts[row] || m.columns[b - 1] < m.columns[b]);
    }
  }
  Opened* opened = sound && sums_agree(m) ? new (std::nothrow) Opened(m) : nullptr;
  if (!opened) {
    std::free(m.copy);
    return fail(SFK_BAD_FILE, "the tables of the packed matrix contradict each other");
  }
  *linear = opened;
  return SFK_OK;
}

void sfk_close(sfk_linear* linear) {
  if (!linear) return;
  auto* opened = static_cast<Opened*>(linear);
  std::free(opened->copy);
  delete opened;
}

int64_t sfk_outputs(const sfk_linear* linear) { return linear->outputs; }
int64_t sfk_inputs(const sfk_linear* linear) { return linear->inputs; }
int64_t sfk_blocks(const sfk_linear* linear) { return linear->blocks; }
}

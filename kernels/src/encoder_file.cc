// The packed encoder, version 2, little-endian; every section begins at a multiple of 64 bytes.
//
//   header     64 bytes: "SLIMENCO", u16 version, u16 activation (1 relu, 2 gelu, 3 gelu by tanh), u32 layers, u32 hidden,
//              u32 head_dim, u32 vocabulary, u32 positions, u32 types, f32 epsilon of all norms, u32 first_position, u32 flags
//              (1: only first columns are wanted, 2: positions count what is no padding; from version 2 on 4: words are codes, 8: positions
//              are int8), u64 bytes of all, u64 digest
//   directory  (u64 offset, u64 bytes) of each section; 0 bytes: absent
//   sections   words i8 [vocabulary][hidden], their scales f32 [vocabulary], positions f32 [positions][hidden], types f32
//              [types][hidden] or absent, norm of the embeddings f32 [2][hidden] (gain, shift); then for each layer: query,
//              key_value (keys, then values), out (packed matrices), norm, into, down, norm. A sublayer that was cut has none of
//              its sections. query is scaled so that 2^(query . key) are the weights of the attention.
//              Where words are codes: in the first section u8 [vocabulary][parts], in the second f32 scales [parts][entries] and then i8
//              pieces [parts][entries][hidden / parts]; a word is the pieces that its codes name, one after the other.
//              Where positions are int8: f32 scales [positions] and then i8 [positions][hidden].
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "digest.h"
#include "encoder.h"
#include "status.h"

namespace {

struct Header {
  char magic[8];
  uint16_t version, activation;
  uint32_t layers, hidden, head_dim, vocabulary, positions, types;
  float epsilon;
  uint32_t first_position, flags;
  uint64_t bytes, digest;
};
static_assert(sizeof(Header) == 64, "the header has no gaps");

struct Section {
  uint64_t offset, bytes;
};

constexpr uint16_t VERSION = 2;
constexpr uint32_t FIRST_ONLY = 1, POSITIONS_BY_ID = 2, CODES = 4, INT8_POSITIONS = 8;
constexpr uint32_t MOST_LAYERS = 1000, MOST = 1 << 24;
constexpr size_t TABLES = 5, OF_LAYER = 7;
constexpr uint64_t MOST_ENTRIES = 256;

class Reader {
 public:
  Reader(const unsigned char* base, const Header& header) : base_(base), bytes_(header.bytes), count_(TABLES + header.layers * OF_LAYER) {}

  bool has_directory() const { return sizeof(Header) + count_ * sizeof(Section) <= bytes_; }

  Section section(size_t index) const {
    Section s;
    std::memcpy(&s, base_ + sizeof(Header) + index * sizeof(Section), sizeof s);
    return s;
  }

  // That many bytes of the section; null, and no longer sound, if it has another size or lies elsewhere.
  const void* exactly(size_t index, uint64_t bytes) {
    const Section s = section(index);
    const bool inside = s.offset % 64 == 0 && s.offset <= bytes_ && s.bytes <= bytes_ - s.offset;
    sound = sound && inside && s.bytes == bytes;
    return sound ? base_ + s.offset : nullptr;
  }

  const float* floats(size_t index, uint64_t count) {
    const float* at = static_cast<const float*>(exactly(index, count * 4));
    for (uint64_t i = 0; sound && i < count; i++) sound = std::isfinite(at[i]);
    return at;
  }

  Norm norm(size_t index, uint64_t hidden) {
    const float* at = floats(index, 2 * hidden);
    return sound ? Norm{at, at + hidden} : Norm{};
  }

  sfk_linear* matrix(size_t index) {
    const void* at = exactly(index, section(index).bytes);
    sfk_linear* opened = nullptr;
    if (sound && sfk_open(at, section(index).bytes, &opened) != SFK_OK) sound = false, told = true;
    return opened;
  }

  bool sound = true;
  bool told = false;  // sfk_message() already says what is wrong

 private:
  const unsigned char* base_;
  uint64_t bytes_;
  size_t count_;
};

// The sizes follow from those of the sections: so many codes for a word, and entries of a scale for each part and a number for each unit.
void read_codes(Reader& reader, sfk_encoder* e) {
  const uint64_t vocabulary = static_cast<uint64_t>(e->vocabulary), hidden = static_cast<uint64_t>(e->hidden);
  const Section codes = reader.section(0), book = reader.section(1);
  const uint64_t parts = codes.bytes / vocabulary;
  reader.sound = reader.sound && parts >= 1 && parts <= hidden && hidden % parts == 0;
  if (!reader.sound) return;
  const uint64_t entries = book.bytes / (4 * parts + hidden);
  reader.sound = entries >= 1 && entries <= MOST_ENTRIES;
  e->codes = static_cast<const uint8_t*>(reader.exactly(0, vocabulary * parts));
  const char* at = static_cast<const char*>(reader.exactly(1, entries * (4 * parts + hidden)));
  if (!reader.sound) return;
  e->parts = static_cast<int64_t>(parts), e->entries = static_cast<int64_t>(entries);
  e->book_scale = reinterpret_cast<const float*>(at);
  e->book = reinterpret_cast<const int8_t*>(at + 4 * parts * entries);
  for (uint64_t i = 0; reader.sound && i < parts * entries; i++) reader.sound = std::isfinite(e->book_scale[i]);
  for (uint64_t i = 0; reader.sound && i < vocabulary * parts; i++) reader.sound = e->codes[i] < entries;
}

// False if there is no memory for them.
bool read_positions(Reader& reader, sfk_encoder* e) {
  const uint64_t positions = static_cast<uint64_t>(e->positions), hidden = static_cast<uint64_t>(e->hidden);
  const char* at = static_cast<const char*>(reader.exactly(2, positions * (4 + hidden)));
  if (!reader.sound) return true;
  const float* scale = reinterpret_cast<const float*>(at);
  const int8_t* number = reinterpret_cast<const int8_t*>(at + 4 * positions);
  e->position = e->unpacked = static_cast<float*>(std::malloc(positions * hidden * 4));
  if (!e->unpacked) return false;
  for (uint64_t row = 0; reader.sound && row < positions; row++) {
    reader.sound = std::isfinite(scale[row]);
    for (uint64_t i = 0; i < hidden; i++) e->unpacked[row * hidden + i] = number[row * hidden + i] * scale[row];
  }
  return true;
}

void read_layer(Reader& reader, size_t first, sfk_encoder* e, Layer* layer) {
  if (reader.section(first).bytes) {
    layer->query = reader.matrix(first), layer->key_value = reader.matrix(first + 1), layer->out = reader.matrix(first + 2);
    layer->attention_norm = reader.norm(first + 3, static_cast<uint64_t>(e->hidden));
    if (!reader.sound) return;
    const int64_t width = layer->query->outputs;
    layer->heads = static_cast<int>(width / e->head_dim);
    reader.sound = width % e->head_dim == 0 && layer->query->inputs == e->hidden && layer->key_value->inputs == e->hidden &&
                   layer->key_value->outputs == 2 * width && layer->out->inputs == width && layer->out->outputs == e->hidden;
    e->widest = width > e->widest ? width : e->widest;
  }
  if (reader.sound && reader.section(first + 4).bytes) {
    layer->into = reader.matrix(first + 4), layer->down = reader.matrix(first + 5);
    layer->ffn_norm = reader.norm(first + 6, static_cast<uint64_t>(e->hidden));
    if (!reader.sound) return;
    const int64_t width = layer->into->outputs;
    reader.sound = layer->into->inputs == e->hidden && layer->down->inputs == width && layer->down->outputs == e->hidden;
    e->widest = width > e->widest ? width : e->widest;
  }
}

bool sizes_make_sense(const Header& h) {
  const bool version = h.version == VERSION || (h.version == 1 && h.flags < CODES);
  return version && h.activation >= 1 && h.activation <= 3 && h.layers <= MOST_LAYERS && h.hidden >= 1 && h.hidden <= MOST &&
         h.head_dim >= 1 && h.head_dim <= 1024 && h.vocabulary >= 1 && h.vocabulary <= MOST && h.positions >= 1 && h.positions <= MOST &&
         h.types <= MOST && h.first_position < h.positions && h.flags < 2 * INT8_POSITIONS && std::isfinite(h.epsilon) && h.epsilon > 0.0f;
}

}  // namespace

extern "C" {

uint64_t sfk_digest(const void* packed, size_t bytes) { return digest(packed, bytes, offsetof(Header, digest)); }

void sfk_encoder_close(sfk_encoder* e) {
  if (!e) return;
  for (Layer& layer : e->layers)
    for (sfk_linear* linear : {layer.query, layer.key_value, layer.out, layer.into, layer.down}) sfk_close(linear);
  std::free(e->copy);
  std::free(e->unpacked);
  delete e;
}

sfk_status sfk_encoder_open(const void* packed, size_t bytes, sfk_encoder** encoder) {
  if (!packed || !encoder) return fail(SFK_BAD_ARGUMENT, "packed and encoder must be given");
  *encoder = nullptr;
  Header h;
  if (bytes < sizeof h) return fail(SFK_BAD_FILE, "%zu bytes are too few for a packed encoder", bytes);
  std::memcpy(&h, packed, sizeof h);
  if (std::memcmp(h.magic, "SLIMENCO", 8) != 0) return fail(SFK_BAD_FILE, "these bytes are no packed encoder");
  if (h.version > VERSION)
    return fail(SFK_NEWER_FILE, "the encoder is packed in format %d; this library (%s) reads up to %d: install a newer slimformer-kernels",
                h.version, SFK_VERSION, VERSION);
  if (!sizes_make_sense(h)) return fail(SFK_BAD_FILE, "the header of the packed encoder makes no sense");
  if (h.bytes != bytes) return fail(SFK_BAD_FILE, "the packed encoder should have %llu bytes and has %zu", static_cast<unsigned long long>(h.bytes), bytes);
  if (sfk_digest(packed, bytes) != h.digest)
    return fail(SFK_BAD_FILE, "the digest of the packed encoder does not agree: the file is damaged");

  auto* e = new (std::nothrow) sfk_encoder{};
  if (!e) return fail(SFK_NO_MEMORY, "no memory for an encoder");
  const void* base = packed;
  if (reinterpret_cast<uintptr_t>(packed) % 64) {
    e->copy = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!e->copy) {
      delete e;
      return fail(SFK_NO_MEMORY, "no memory for %zu bytes", bytes);
    }
    std::memcpy(e->copy, packed, bytes);
    base = e->copy;
  }
  e->hidden = h.hidden, e->head_dim = h.head_dim, e->vocabulary = h.vocabulary, e->positions = h.positions, e->types = h.types;
  e->first_position = h.first_position, e->first_only = h.flags & FIRST_ONLY, e->positions_by_id = h.flags & POSITIONS_BY_ID;
  e->activation = h.activation, e->epsilon = h.epsilon, e->widest = h.hidden;
  Reader reader(static_cast<const unsigned char*>(base), h);
  reader.sound = reader.has_directory();
  const uint64_t hidden = h.hidden;
  if (reader.sound) {
    if (h.flags & CODES) {
      read_codes(reader, e);
    } else {
      e->words = static_cast<const int8_t*>(reader.exactly(0, h.vocabulary * hidden));
      e->word_scale = reader.floats(1, h.vocabulary);
    }
    if (!(h.flags & INT8_POSITIONS)) {
      e->position = reader.floats(2, h.positions * hidden);
    } else if (!read_positions(reader, e)) {
      sfk_encoder_close(e);
      return fail(SFK_NO_MEMORY, "no memory for %lld positions", static_cast<long long>(h.positions));
    }
    if (h.types) e->type = reader.floats(3, h.types * hidden);
    e->embedding_norm = reader.norm(4, hidden);
    e->layers.resize(h.layers);
    for (size_t i = 0; reader.sound && i < h.layers; i++) read_layer(reader, TABLES + i * OF_LAYER, e, &e->layers[i]);
  }
  if (!reader.sound) {
    sfk_encoder_close(e);
    return reader.told ? SFK_BAD_FILE : fail(SFK_BAD_FILE, "the tables of the packed encoder contradict each other");
  }
  *encoder = e;
  return SFK_OK;
}

int64_t sfk_encoder_hidden(const sfk_encoder* encoder) { return encoder->hidden; }
int sfk_encoder_first_only(const sfk_encoder* encoder) { return encoder->first_only; }
}

// The packed encoder, version 1, little-endian; every section begins at a multiple of 64 bytes.
//
//   header     64 bytes: "SLIMENCO", u16 version, u16 activation (1 relu, 2 gelu, 3 gelu by tanh), u32 layers, u32 hidden,
//              u32 head_dim, u32 vocabulary, u32 positions, u32 types, f32 epsilon of all norms, u32 first_position, u32 flags
//              (1: only first columns are wanted, 2: positions count what is no padding), u64 bytes of all, u64 digest
//   directory  (u64 offset, u64 bytes) of each section; 0 bytes: absent
//   sections   words i8 [vocabulary][hidden], their scales f32 [vocabulary], positions f32 [positions][hidden], types f32
//              [types][hidden] or absent, norm of the embeddings f32 [2][hidden] (gain, shift); then for each layer: query,
//              key_value (keys, then values), out (packed matrices), norm, into, down, norm. A sublayer that was cut has none of
//              its sections. query is scaled so that 2^(query . key) are the weights of the attention.
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

constexpr uint16_t VERSION = 1;
constexpr uint32_t MOST_LAYERS = 1000, MOST = 1 << 24;
constexpr size_t TABLES = 5, OF_LAYER = 7;

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
  return h.version == VERSION && h.activation >= 1 && h.activation <= 3 && h.layers <= MOST_LAYERS && h.hidden >= 1 && h.hidden <= MOST &&
         h.head_dim >= 1 && h.head_dim <= 1024 && h.vocabulary >= 1 && h.vocabulary <= MOST && h.positions >= 1 && h.positions <= MOST &&
         h.types <= MOST && h.first_position < h.positions && h.flags <= 3 && std::isfinite(h.epsilon) && h.epsilon > 0.0f;
}

}  // namespace

extern "C" {

uint64_t sfk_digest(const void* packed, size_t bytes) { return digest(packed, bytes, offsetof(Header, digest)); }

void sfk_encoder_close(sfk_encoder* e) {
  if (!e) return;
  for (Layer& layer : e->layers)
    for (sfk_linear* linear : {layer.query, layer.key_value, layer.out, layer.into, layer.down}) sfk_close(linear);
  std::free(e->copy);
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
  e->first_position = h.first_position, e->first_only = h.flags & 1, e->positions_by_id = h.flags & 2;
  e->activation = h.activation, e->epsilon = h.epsilon, e->widest = h.hidden;
  Reader reader(static_cast<const unsigned char*>(base), h);
  reader.sound = reader.has_directory();
  const uint64_t hidden = h.hidden;
  if (reader.sound) {
    e->words = static_cast<const int8_t*>(reader.exactly(0, h.vocabulary * hidden));
    e->word_scale = reader.floats(1, h.vocabulary);
    e->position = reader.floats(2, h.positions * hidden);
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

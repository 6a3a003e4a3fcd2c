// 8 lanes. Included after `#pragma GCC target`; see kernels.inc for what each name means. With HAVE_VNNI a dot product is one
// instruction; without, bytes are widened to 16 bits, because vpmaddubsw would saturate.
namespace {
constexpr int LANES = 8;
using vf = __m256;
using vi = __m256i;

inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vi load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline void store(void* p, vi a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline vf all(float a) { return _mm256_set1_ps(a); }
inline vi all(int32_t a) { return _mm256_set1_epi32(a); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf root(vf a) { return _mm256_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf least(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf most(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf magnitude(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vf where_more(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi either(vi a, vi b) { return _mm256_or_si256(a, b); }
template <int N> inline vi left(vi a) { return _mm256_slli_epi32(a, N); }
inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
inline vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
inline vf as_float(vi a) { return _mm256_castsi256_ps(a); }
inline vi as_int(vf a) { return _mm256_castps_si256(a); }
inline void store_bytes(uint8_t* p, vi a) {
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}
inline vf load_signed(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// The first `count` lanes, fewer than all; the rest is neither read nor written.
inline vi first_lanes(int count) { return _mm256_cmpgt_epi32(all(int32_t{count}), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline vf load_part(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void store_part(float* p, vf a, int count) { _mm256_maskstore_ps(p, first_lanes(count), a); }

#ifdef HAVE_VNNI
struct codes_t {
  vi a;
};
struct weights_t {
  vi a;
};
inline codes_t load_codes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline weights_t all_weights(int32_t four) { return {_mm256_set1_epi32(four)}; }
inline vi dot(vi sum, codes_t x, weights_t w) { return DOT(sum, x.a, w.a); }
#else
// Bytes 0 and 2 of each lane, and bytes 1 and 3, as pairs of 16-bit integers.
struct codes_t {
  vi even, odd;
};
struct weights_t {
  vi even, odd;
};
inline codes_t load_codes(const uint8_t* p) {
  vi a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srli_epi16(a, 8)};
}
inline weights_t all_weights(int32_t four) {
  vi a = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)};
}
inline vi dot(vi sum, codes_t x, weights_t w) {
  return add(sum, add(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd)));
}
#endif

// As for 16 lanes, with 8 x 8 items.
inline void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int rows, int columns) {
  __m256i r[8], t[8];
  __m256i count = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i in = _mm256_cmpgt_epi32(all(int32_t{columns}), count), out = _mm256_cmpgt_epi32(all(int32_t{rows}), count);
  for (int i = 0; i < 8; i++)
    r[i] = i < rows ? _mm256_maskload_epi32(reinterpret_cast<const int*>(from + i * from_stride), in) : _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
  }
  for (int i = 0; i < columns; i++) _mm256_maskstore_epi32(reinterpret_cast<int*>(to + i * to_stride), out, t[i]);
}
constexpr int BLOCK = 8;
}  // namespace

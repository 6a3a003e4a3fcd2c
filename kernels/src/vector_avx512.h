// 16 lanes. Included after `#pragma GCC target`; see kernels.inc for what each name means.
namespace {
constexpr int LANES = 16;
using vf = __m512;
using vi = __m512i;

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline void store(void* p, vi a) { _mm512_storeu_si512(p, a); }
inline vf all(float a) { return _mm512_set1_ps(a); }
inline vi all(int32_t a) { return _mm512_set1_epi32(a); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf root(vf a) { return _mm512_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf least(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf most(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf magnitude(vf a) { return _mm512_abs_ps(a); }
inline vf where_more(vf a, vf b, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes); }
inline vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi either(vi a, vi b) { return _mm512_or_si512(a, b); }
template <int N> inline vi left(vi a) { return _mm512_slli_epi32(a, N); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
inline vf as_float(vi a) { return _mm512_castsi512_ps(a); }
inline vi as_int(vf a) { return _mm512_castps_si512(a); }
inline void store_bytes(uint8_t* p, vi a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
inline vf load_signed(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The first `count` lanes, fewer than all; the rest is neither read nor written.
inline vf load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p); }
inline void store_part(float* p, vf a, int count) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), a); }

struct codes_t {
  vi a;
};
struct weights_t {
  vi a;
};
inline codes_t load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline weights_t all_weights(int32_t four) { return {_mm512_set1_epi32(four)}; }
inline vi dot(vi sum, codes_t x, weights_t w) { return _mm512_dpbusd_epi32(sum, x.a, w.a); }

// A 16 x 16 block of 32-bit items; rows beyond `rows` read as 0, columns beyond `columns` are neither read nor written.
inline void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int rows, int columns) {
  __m512i r[16], t[16];
  __mmask16 in = static_cast<__mmask16>((1u << columns) - 1), out = static_cast<__mmask16>((1u << rows) - 1);
  for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_maskz_loadu_epi32(in, from + i * from_stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4g + c] now holds columns c, c + 4, c + 8, c + 12 of rows 4g to 4g + 3, one column in each 128 bits.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
  }
  for (int i = 0; i < columns; i++) _mm512_mask_storeu_epi32(to + i * to_stride, out, r[i]);
}
constexpr int BLOCK = 16;
}  // namespace

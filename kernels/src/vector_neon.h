// 4 lanes. Included after `#pragma GCC target`; see kernels.inc for what each name means. Dot products are of signed bytes: codes are
// loaded as x - 128, and 128 times the weights' sum is added to each product, so that sums are those of the other paths.
namespace {
constexpr int LANES = 4;
using vf = float32x4_t;
using vi = int32x4_t;

inline vf load(const float* p) { return vld1q_f32(p); }
inline vi load(const int32_t* p) { return vld1q_s32(p); }
inline void store(float* p, vf a) { vst1q_f32(p, a); }
inline void store(void* p, vi a) { vst1q_s8(static_cast<int8_t*>(p), vreinterpretq_s8_s32(a)); }
inline vf all(float a) { return vdupq_n_f32(a); }
inline vi all(int32_t a) { return vdupq_n_s32(a); }
inline vf add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf sub(vf a, vf b) { return vsubq_f32(a, b); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf div(vf a, vf b) { return vdivq_f32(a, b); }
inline vf root(vf a) { return vsqrtq_f32(a); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf where_more(vf a, vf b, vf yes, vf no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
// vminq and vmaxq tell -0 from 0, which x86 does not.
inline vf least(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline vf most(vf a, vf b) { return where_more(a, b, a, b); }
inline vf magnitude(vf a) { return vabsq_f32(a); }
inline vi add(vi a, vi b) { return vaddq_s32(a, b); }
inline vi sub(vi a, vi b) { return vsubq_s32(a, b); }
inline vi mul(vi a, vi b) { return vmulq_s32(a, b); }
inline vi either(vi a, vi b) { return vorrq_s32(a, b); }
template <int N> inline vi left(vi a) { return vshlq_n_s32(a, N); }
inline vf to_float(vi a) { return vcvtq_f32_s32(a); }
inline vi to_int(vf a) { return vcvtnq_s32_f32(a); }
inline vf as_float(vi a) { return vreinterpretq_f32_s32(a); }
inline vi as_int(vf a) { return vreinterpretq_s32_f32(a); }
inline void store_bytes(uint8_t* p, vi a) {
  uint16x4_t half = vqmovun_s32(a);
  uint8x8_t bytes = vqmovn_u16(vcombine_u16(half, half));
  uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  __builtin_memcpy(p, &four, 4);
}
inline vf load_signed(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
// The first `count` lanes, fewer than all; the rest is neither read nor written.
inline vf load_part(const float* p, int count) {
  float lanes[LANES] = {};
  for (int i = 0; i < count; i++) lanes[i] = p[i];
  return load(lanes);
}
inline void store_part(float* p, vf a, int count) {
  float lanes[LANES];
  store(lanes, a);
  for (int i = 0; i < count; i++) p[i] = lanes[i];
}

struct codes_t {
  int8x16_t a;
};
struct weights_t {
  int8x16_t a;
  vi shift;
};
inline codes_t load_codes(const uint8_t* p) { return {vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128)))}; }
inline weights_t all_weights(int32_t four) {
  int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return {a, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), a), 7)};
}
inline vi dot(vi sum, codes_t x, weights_t w) { return vdotq_s32(add(sum, w.shift), x.a, w.a); }

// As for 16 lanes, with 4 x 4 items.
inline void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int rows, int columns) {
  if (rows < 4 || columns < 4) {
    for (int j = 0; j < columns; j++)
      for (int i = 0; i < rows; i++) to[j * to_stride + i] = from[i * from_stride + j];
    return;
  }
  uint32x4_t r[4];
  for (int i = 0; i < 4; i++) r[i] = vld1q_u32(from + i * from_stride);
  uint32x4x2_t upper = vtrnq_u32(r[0], r[1]), lower = vtrnq_u32(r[2], r[3]);
  for (int j = 0; j < 2; j++) {
    vst1q_u32(to + j * to_stride, vcombine_u32(vget_low_u32(upper.val[j]), vget_low_u32(lower.val[j])));
    vst1q_u32(to + (j + 2) * to_stride, vcombine_u32(vget_high_u32(upper.val[j]), vget_high_u32(lower.val[j])));
  }
}
constexpr int BLOCK = 4;
}  // namespace

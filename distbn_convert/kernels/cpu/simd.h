// Vectors of 64 bytes in the compiler's own extension, so that one source serves AVX-512, AVX2,
// NEON and plain machines with the same number of lanes, and loads and stores that convert.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace distbn {

using c10::BFloat16;
using c10::Half;

// The accumulation type: float64 for float64, else float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
constexpr int kLanes = 64 / sizeof(A);

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using Vec = typename VecOf<A>::type;

typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

template <class A>
INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// All ones in the first `count` lanes.
template <class A>
INLINE auto first_lanes(int64_t count) {
  Vec<A> iota;
  for (int i = 0; i < kLanes<A>; ++i) iota[i] = A(i);
  return iota < splat<A>(A(count));
}

// In double, halves upon halves; the order is the same on every machine.
template <class A>
INLINE double sum_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, double>) {
    return _mm512_reduce_add_pd((__m512d)v);
  } else {
    const __m256 high = (__m256)_mm512_extractf64x4_pd((__m512d)v, 1);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    return _mm512_reduce_add_pd(low + _mm512_cvtps_pd(high));
  }
#endif
  double sums[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) sums[i] = double(v[i]);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// GCC converts vectors in halves, which takes three instructions more.
INLINE U32x16 extend(U16x16 bits) {
#if defined(__AVX512F__)
  return (U32x16)_mm512_cvtepu16_epi32((__m256i)bits);
#else
  return __builtin_convertvector(bits, U32x16);
#endif
}

INLINE U16x16 truncate(U32x16 bits) {
#if defined(__AVX512F__)
  return (U16x16)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, U16x16);
#endif
}

INLINE Vec<float> widen(U16x16 bits, BFloat16) { return (Vec<float>)(extend(bits) << 16); }

// Round to nearest, ties to even, as c10::BFloat16 does; a NaN becomes 0x7fc0.
INLINE U16x16 narrow(Vec<float> v, BFloat16) {
  const U32x16 bits = (U32x16)v;
  const U32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return truncate(v == v ? rounded : U32x16{} + 0x7fc0u);
}

INLINE Vec<float> widen(U16x16 bits, Half) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#else
  Vec<float> v;
#if defined(__F16C__)
  __m128i halves[2];
  std::memcpy(halves, &bits, 32);
  const __m256 wide[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  std::memcpy(&v, wide, 64);
#else
  for (int i = 0; i < 16; ++i) v[i] = float(Half(bits[i], Half::from_bits()));
#endif
  return v;
#endif
}

INLINE U16x16 narrow(Vec<float> v, Half) {
#if defined(__AVX512F__)
  return (U16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  U16x16 bits;
#if defined(__F16C__)
  __m256 wide[2];
  std::memcpy(wide, &v, 64);
  const __m128i halves[2] = {_mm256_cvtps_ph(wide[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(wide[1], _MM_FROUND_TO_NEAREST_INT)};
  std::memcpy(&bits, halves, 32);
#else
  for (int i = 0; i < 16; ++i) bits[i] = Half(v[i]).x;
#endif
  return bits;
#endif
}

// The 64 (or, for the half types, 32) bytes of memory behind one vector.
template <class T>
using Packed = std::conditional_t<sizeof(T) == 2, U16x16, Vec<Acc<T>>>;

template <class T>
INLINE Vec<Acc<T>> unpack(Packed<T> packed) {
  if constexpr (sizeof(T) == 2) {
    return widen(packed, T());
  } else {
    return packed;
  }
}

template <class T>
INLINE Packed<T> pack(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    return narrow(v, T());
  } else {
    return v;
  }
}

template <class T>
INLINE Vec<Acc<T>> load(const T* p) {
  Packed<T> packed;
  std::memcpy(&packed, p, sizeof packed);
  return unpack<T>(packed);
}

template <class T>
INLINE void store(T* p, Vec<Acc<T>> v) {
  const Packed<T> packed = pack<T>(v);
  std::memcpy(p, &packed, sizeof packed);
}

constexpr int64_t kLineBytes = 64;

// Values from p to the start of the next cache line, 0 at one.
template <class T>
INLINE int64_t to_next_line(const T* p) {
  return (-reinterpret_cast<intptr_t>(p) & (kLineBytes - 1)) / int64_t(sizeof(T));
}

// Writes past the caches a vector whose address is a multiple of its size; see fence().
template <class T>
INLINE void stream(T* p, Vec<Acc<T>> v) {
  const Packed<T> packed = pack<T>(v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256((__m256i*)p, (__m256i)packed);
  } else {
    _mm512_stream_si512((__m512i*)p, (__m512i)packed);
  }
#elif defined(__AVX2__)
  __m256i halves[sizeof packed / 32];
  std::memcpy(halves, &packed, sizeof packed);
  for (size_t i = 0; i < sizeof packed / 32; ++i) _mm256_stream_si256((__m256i*)p + i, halves[i]);
#else
  std::memcpy(p, &packed, sizeof packed);
#endif
}

// Makes what this thread has streamed visible to others before anything that it writes later.
INLINE void fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// Loads the first `count` lanes, zeros behind them; touches no memory past them.
template <class T>
INLINE Vec<Acc<T>> load(const T* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    return unpack<T>((U16x16)_mm256_maskz_loadu_epi16(__mmask16(mask), p));
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  }
#else
  Packed<T> packed{};
  std::memcpy(&packed, p, count * sizeof(T));
  return unpack<T>(packed);
#endif
}

template <class T>
INLINE void store(T* p, Vec<Acc<T>> v, int64_t count) {
  const Packed<T> packed = pack<T>(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)packed);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)packed);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)packed);
  }
#else
  std::memcpy(p, &packed, count * sizeof(T));
#endif
}

}  // namespace distbn

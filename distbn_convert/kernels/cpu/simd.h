// Vectors of 64 bytes, so that one source serves AVX-512, AVX2, NEON and plain machines with the
// same number of lanes, and loads and stores that convert.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// For what takes long to compile and little time to run.
#define NOINLINE __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace distbn {

using c10::BFloat16;
using c10::Half;

// The accumulation type: float64 for float64, else float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bytes of the machine's own vectors, and how many vectors of 64 bytes half of its registers hold.
#if defined(__AVX512F__)
constexpr int kNativeBytes = 64, kHalfOfRegisters = 16;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32, kHalfOfRegisters = 4;
#elif defined(__aarch64__)
constexpr int kNativeBytes = 16, kHalfOfRegisters = 4;
#else
constexpr int kNativeBytes = 16, kHalfOfRegisters = 2;
#endif

template <class A>
constexpr int kLanes = 64 / sizeof(A);
template <class A>
constexpr int kLeafLanes = kNativeBytes / sizeof(A);

template <class X, int N>
struct NativeOf {
  typedef X type __attribute__((vector_size(N * sizeof(X))));
};

// N values: the compiler's own vector if a register holds as many, else halves. GCC keeps longer
// vectors of its own in memory, which takes up to four times as long.
template <class A, int N>
struct Halves;
template <class A, int N>
using Lanes = typename std::conditional_t<(N > kLeafLanes<A>), std::type_identity<Halves<A, N>>,
                                          NativeOf<A, N>>::type;

template <class A, int N>
struct Halves {
  using Half = Lanes<A, N / 2>;
  static constexpr int kHalf = N / 2;
  Half low, high;

  friend INLINE Halves operator+(Halves a, Halves b) { return {a.low + b.low, a.high + b.high}; }
  friend INLINE Halves operator-(Halves a, Halves b) { return {a.low - b.low, a.high - b.high}; }
  friend INLINE Halves operator*(Halves a, Halves b) { return {a.low * b.low, a.high * b.high}; }
  INLINE Halves& operator+=(Halves b) { return *this = *this + b; }
};

template <class A>
using Vec = Lanes<A, kLanes<A>>;
// The part of a vector that is in one register.
template <class A>
using Leaf = Lanes<A, kLeafLanes<A>>;

template <class V>
constexpr bool kIsHalves = false;
template <class A, int N>
constexpr bool kIsHalves<Halves<A, N>> = true;

// Makes a vector of make(i), the leaf whose first lane is the vector's lane i.
template <class V, class Make>
INLINE V from_leaves(const Make& make, int64_t i = 0) {
  if constexpr (kIsHalves<V>) {
    using Half = typename V::Half;
    return {from_leaves<Half>(make, i), from_leaves<Half>(make, i + V::kHalf)};
  } else {
    return make(i);
  }
}

// Calls take(leaf, i) for each leaf.
template <class V, class Take>
INLINE void each_leaf(const V& v, const Take& take, int64_t i = 0) {
  if constexpr (kIsHalves<V>) {
    each_leaf(v.low, take, i);
    each_leaf(v.high, take, i + V::kHalf);
  } else {
    take(v, i);
  }
}

template <class A>
INLINE Vec<A> splat(A value) {
  return from_leaves<Vec<A>>([=](int64_t) INLINE_LAMBDA { return value - Leaf<A>{}; });
}

// All ones in the first `count` lanes of a leaf.
template <class A>
INLINE auto before(int64_t count) {
  Leaf<A> iota;
  for (int i = 0; i < kLeafLanes<A>; ++i) iota[i] = A(i);
  return iota < A(count) - Leaf<A>{};
}

// The value in the first `count` lanes, zeros behind them.
template <class A>
INLINE Vec<A> splat(A value, int64_t count) {
  return from_leaves<Vec<A>>([=](int64_t i) INLINE_LAMBDA {
    return before<A>(count - i) ? value - Leaf<A>{} : Leaf<A>{};
  });
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
#elif defined(__AVX2__)
  __m256d sums;
  if constexpr (std::is_same_v<A, double>) {
    sums = (__m256d)(v.low + v.high);
  } else {
    const __m256 low = (__m256)v.low, high = (__m256)v.high;
    sums = (_mm256_cvtps_pd(_mm256_castps256_ps128(low)) +
            _mm256_cvtps_pd(_mm256_castps256_ps128(high))) +
           (_mm256_cvtps_pd(_mm256_extractf128_ps(low, 1)) +
            _mm256_cvtps_pd(_mm256_extractf128_ps(high, 1)));
  }
  const __m128d pair = _mm256_castpd256_pd128(sums) + _mm256_extractf128_pd(sums, 1);
  return pair[0] + pair[1];
#else
  double sums[kLanes<A>];
  each_leaf(v, [&](const auto& leaf, int64_t at) INLINE_LAMBDA {
    for (int i = 0; i < kLeafLanes<A>; ++i) sums[at + i] = double(leaf[i]);
  });
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
#endif
}

typedef NativeOf<uint32_t, kLeafLanes<float>>::type LeafU32;
typedef NativeOf<uint16_t, kLeafLanes<float>>::type LeafU16;

// GCC's own conversions take more instructions than these.
INLINE LeafU32 extend(LeafU16 bits) {
#if defined(__AVX512F__)
  return (LeafU32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (LeafU32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, LeafU32);
#endif
}

INLINE LeafU16 truncate(LeafU32 bits) {
#if defined(__AVX512F__)
  return (LeafU16)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)bits;
  return (LeafU16)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  return __builtin_convertvector(bits, LeafU16);
#endif
}

INLINE Leaf<float> widen(LeafU16 bits, BFloat16) { return (Leaf<float>)(extend(bits) << 16); }

// Round to nearest, ties to even, as c10::BFloat16 does; a NaN becomes 0x7fc0.
INLINE LeafU16 narrow(Leaf<float> v, BFloat16) {
  const LeafU32 bits = (LeafU32)v;
  const LeafU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return truncate(v == v ? rounded : LeafU32{} + 0x7fc0u);
}

INLINE Leaf<float> widen(LeafU16 bits, Half) {
#if defined(__AVX512F__)
  return (Leaf<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return (Leaf<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Leaf<float> v;
  for (int i = 0; i < kLeafLanes<float>; ++i) v[i] = float(Half(bits[i], Half::from_bits()));
  return v;
#endif
}

INLINE LeafU16 narrow(Leaf<float> v, Half) {
#if defined(__AVX512F__)
  return (LeafU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (LeafU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  LeafU16 bits;
  for (int i = 0; i < kLeafLanes<float>; ++i) bits[i] = Half(v[i]).x;
  return bits;
#endif
}

// What lies in memory behind a leaf, as many bytes or, for the half types, half as many.
template <class T>
using Packed = std::conditional_t<sizeof(T) == 2, LeafU16, Leaf<Acc<T>>>;

template <class T>
INLINE Leaf<Acc<T>> unpack(Packed<T> packed) {
  if constexpr (sizeof(T) == 2) {
    return widen(packed, T());
  } else {
    return packed;
  }
}

template <class T>
INLINE Packed<T> pack(Leaf<Acc<T>> leaf) {
  if constexpr (sizeof(T) == 2) {
    return narrow(leaf, T());
  } else {
    return leaf;
  }
}

template <class T>
INLINE Vec<Acc<T>> load(const T* p) {
  return from_leaves<Vec<Acc<T>>>([=](int64_t i) INLINE_LAMBDA {
    Packed<T> packed;
    std::memcpy(&packed, p + i, sizeof packed);
    return unpack<T>(packed);
  });
}

template <class T>
INLINE void store(T* p, Vec<Acc<T>> v) {
  each_leaf(v, [=](const auto& leaf, int64_t i) INLINE_LAMBDA {
    const Packed<T> packed = pack<T>(leaf);
    std::memcpy(p + i, &packed, sizeof packed);
  });
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
#if defined(__AVX512F__) || defined(__AVX2__)
  each_leaf(v, [=](const auto& leaf, int64_t i) INLINE_LAMBDA {
    const Packed<T> packed = pack<T>(leaf);
    if constexpr (sizeof packed == 16) {
      _mm_stream_si128((__m128i*)(p + i), (__m128i)packed);
    } else if constexpr (sizeof packed == 32) {
      _mm256_stream_si256((__m256i*)(p + i), (__m256i)packed);
    } else {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)(p + i), (__m512i)packed);
#endif
    }
  });
#else
  store(p, v);
#endif
}

// Makes what this thread has streamed visible to others before anything that it writes later.
INLINE void fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// Copies fewer than 32 bytes, an even number.
INLINE void copy_few(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const auto copy = [&](auto size) INLINE_LAMBDA {
    if (!(bytes & size)) return;
    std::memcpy(out, in, size);
    out += size;
    in += size;
  };
  copy(std::integral_constant<int, 16>());
  copy(std::integral_constant<int, 8>());
  copy(std::integral_constant<int, 4>());
  copy(std::integral_constant<int, 2>());
}

#if defined(__AVX512F__)  // with BW and VL, or this does not compile
template <class T>
INLINE Packed<T> load_few(const T* p, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    return (Packed<T>)_mm256_maskz_loadu_epi16(__mmask16(mask), p);
  } else if constexpr (sizeof(T) == 4) {
    return (Packed<T>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    return (Packed<T>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  }
}

template <class T>
INLINE void store_few(T* p, Packed<T> packed, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)packed);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)packed);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)packed);
  }
}
#else
// One to four values of two bytes. A copy of them, written in parts and read as one, would be waited
// for.
INLINE uint64_t load_four(const uint16_t* p, int64_t count) {
  uint64_t four;
  uint32_t first, last;
  if (count == 1) return *p;
  if (count == 4) {
    std::memcpy(&four, p, sizeof four);
    return four;
  }
  std::memcpy(&first, p, sizeof first);
  std::memcpy(&last, p + count - 2, sizeof last);
  return first | uint64_t(last) >> 16 * (4 - count) << 32;
}

template <class T>
INLINE Packed<T> load_few(const T* p, int64_t count) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kFours = kLeafLanes<float> / 4;
    typename NativeOf<uint64_t, kFours>::type fours{};
    for (int i = 0; i < kFours; ++i) {
      const int64_t rest = std::min<int64_t>(count - 4 * i, 4);
      if (rest > 0) fours[i] = load_four(reinterpret_cast<const uint16_t*>(p) + 4 * i, rest);
    }
    return (Packed<T>)fours;
  }
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Packed<T>)_mm256_maskload_ps(p, (__m256i)before<T>(count));
  if constexpr (sizeof(T) == 8) return (Packed<T>)_mm256_maskload_pd(p, (__m256i)before<T>(count));
#endif
  Packed<T> packed{};
  copy_few(&packed, p, count * int64_t(sizeof(T)));
  return packed;
}

template <class T>
INLINE void store_few(T* p, Packed<T> packed, int64_t count) {
  copy_few(p, &packed, count * int64_t(sizeof(T)));
}
#endif

// Loads the first `count` lanes, not all, zeros behind them; touches no memory past them.
template <class T>
INLINE Vec<Acc<T>> load(const T* p, int64_t count) {
  return from_leaves<Vec<Acc<T>>>([=](int64_t i) INLINE_LAMBDA {
    Packed<T> packed{};
    if (count - i >= kLeafLanes<Acc<T>>) {
      std::memcpy(&packed, p + i, sizeof packed);
    } else if (count > i) {
      packed = load_few(p + i, count - i);
    }
    return unpack<T>(packed);
  });
}

template <class T>
INLINE void store(T* p, Vec<Acc<T>> v, int64_t count) {
  each_leaf(v, [=](const auto& leaf, int64_t i) INLINE_LAMBDA {
    const Packed<T> packed = pack<T>(leaf);
    if (count - i >= kLeafLanes<Acc<T>>) {
      std::memcpy(p + i, &packed, sizeof packed);
    } else if (count > i) {
      store_few(p + i, packed, count - i);
    }
  });
}

}  // namespace distbn

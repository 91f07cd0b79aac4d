// Checks loads and stores of every count against c10's conversions, one value at a time; built with
// AddressSanitizer, so that what touches memory past the count ends the program.
#include "simd.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

using namespace distbn;

#define EXPECT(condition, ...)                                    \
  if (!(condition)) {                                             \
    std::printf("%s is false: ", #condition), std::printf(__VA_ARGS__); \
    std::exit(1);                                                 \
  }

template <class A>
bool same(A a, A b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

template <class A>
void to_array(Vec<A> v, A* lanes) {
  each_leaf(v, [=](const auto& leaf, int64_t i) { std::memcpy(lanes + i, &leaf, sizeof leaf); });
}

// Any bits: denormals, infinities and NaN among them.
template <class T>
T random_value() {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits = bits << 16 | uint64_t(std::rand() & 0xffff);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// As far from one bfloat16 as from the next, or from one float16: such go to the even one.
template <class A>
A halfway(int dropped_bits) {
  A value = random_value<A>();
  if constexpr (sizeof(A) == 4) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits >> dropped_bits << 1 | 1) << (dropped_bits - 1);
    std::memcpy(&value, &bits, sizeof bits);
  }
  return value;
}

template <class T>
void check_count(int64_t count) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  // Exactly as much memory as may be touched.
  const std::unique_ptr<T[]> from(new T[count]), to(new T[count]);
  for (int64_t i = 0; i < count; ++i) from[i] = random_value<T>();
  const Vec<A> loaded = count == L ? load(from.get()) : load(from.get(), count);
  A lanes[L], copies[L];
  to_array<A>(loaded, lanes);
  for (int i = 0; i < L; ++i) {
    const A expected = i < count ? A(from[i]) : A(0);
    EXPECT(same(lanes[i], expected), "lane %d of %d: %g, not %g\n", i, int(count), double(lanes[i]),
           double(expected));
  }
  A values[L];
  for (int i = 0; i < L; ++i) {
    const A some[] = {A(i) / 7 - 1, random_value<A>(), halfway<A>(16), halfway<A>(13)};
    values[i] = some[std::rand() % 4];
  }
  const Vec<A> wide = load<A>(values);
  count == L ? store(to.get(), wide) : store(to.get(), wide, count);
  for (int64_t i = 0; i < count; ++i) {
    const T expected = T(values[i]);
    EXPECT(same(A(to[i]), A(expected)), "stored %d of %d: %g, not %g\n", int(i), int(count),
           double(A(to[i])), double(A(expected)));
  }
  to_array<A>(splat(A(3), count), copies);
  for (int i = 0; i < L; ++i) EXPECT(copies[i] == (i < count ? 3 : 0), "splat, lane %d\n", i);
}

template <class T>
void check_type() {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  for (int repeat = 0; repeat < 200; ++repeat) {
    for (int64_t count = 0; count <= L; ++count) check_count<T>(count);
  }
  A lanes[L], doubled[L];
  double sum = 0;
  for (int i = 0; i < L; ++i) sum += double(lanes[i] = A(i) * 3 - 20);  // exact in any order
  Vec<A> v = load<A>(lanes);
  EXPECT(sum_lanes<A>(v) == sum, "%g\n", sum);
  v += v * splat(A(2)) - v;
  to_array<A>(v, doubled);
  for (int i = 0; i < L; ++i) EXPECT(doubled[i] == 2 * lanes[i], "arithmetic, lane %d\n", i);
  alignas(64) T memory[L];
  stream(memory, load<A>(lanes));
  fence();
  for (int i = 0; i < L; ++i) EXPECT(same(A(memory[i]), A(T(lanes[i]))), "streamed, lane %d\n", i);
}

int main() {
  check_type<float>();
  check_type<double>();
  check_type<BFloat16>();
  check_type<Half>();
  std::printf("%d bytes\n", kNativeBytes);
}

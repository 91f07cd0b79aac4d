// Inputs laid out as [N, C, S]: a channel of a sample is one run of S values.
// A group is some channels of one rank, most often one; mean, scale and shift of a channel are scalars.
#pragma once

#include "schedule.h"
#include "simd.h"
#include "statistics.h"

#include <utility>

namespace distbn {

constexpr int64_t kRowsChunk = 16384;
// The part of a chunk's values that gives its shift; a sum of squares around it loses at most log2 of
// this many bits.
constexpr int64_t kRowsHeadPart = 16;
constexpr int64_t kRowsMinHead = 64;
// Vectors of lanes of each of two sums: half of the registers, but no more than hide the additions.
constexpr int kSums = std::min(kHalfOfRegisters / 2, 4);
// Values summed in float32 lanes before the sums go to double: 64 to a lane.
constexpr int64_t kRowsFlush = 64 * kSums * kLanes<float>;
// Shorter runs are not streamed: too many of their lines are shared with the next channel's run, and
// a line that is partly streamed costs more than one that is not.
constexpr int64_t kStreamRunBytes = 512;
// Channels of few values go together, up to so many values and so many channels: their statistics
// then become vectors, and no channel waits for the roots and quotients of the one before.
constexpr int64_t kTogetherValues = 8192;
constexpr int64_t kTogether = 16;

template <class T>
struct RowsBase {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  Problem problem;
  Cut cut;
  int64_t together, blocks, groups, max_chunks, partial_size, coefficient_size, work_size;
  bool streamed;

  explicit RowsBase(const Problem& p)
      : problem(p),
        cut(p.positions, kRowsChunk),
        together(std::clamp<int64_t>(
            kTogetherValues / (ceil_div(p.samples, p.ranks) * p.positions), 1,
            std::min(kTogether, p.channels))),
        blocks(ceil_div(p.channels, together)),
        groups(p.ranks * blocks),
        max_chunks(group(0).chunks.count()),
        partial_size(2 * together),
        coefficient_size(4 * together),
        work_size(2 * together),
        streamed(streams<T>(p) && p.positions * int64_t(sizeof(T)) >= kStreamRunBytes) {}

  // Channels of one rank: the first one's first run begins at offset, its next ones stride further on.
  struct Group {
    int64_t rank, channel, channels, offset, stride;
    Chunks chunks;
  };

  Group group(int64_t index) const {
    const int64_t rank = index / blocks, channel = (index - rank * blocks) * together;
    const Share share(problem, rank);
    const int64_t sample = problem.channels * problem.positions;
    return {rank, channel, std::min(together, problem.channels - channel),
            share.first * sample + channel * problem.positions, share.step * sample,
            Chunks(share.count, cut)};
  }

  // Calls full(sum, offset) for whole vectors of a run and part(sum, offset, count) for the rest;
  // successive vectors fall to different sums, so that these do not wait for each other.
  template <class Full, class Part>
  static INLINE void each_vector(int64_t size, const Full& full, const Part& part) {
    constexpr int64_t kStep = kSums * L;
    int64_t i = 0;
    for (; i + kStep <= size; i += kStep) some<kSums>(full, i);
    if constexpr (kSums > 2) {
      if (i + 2 * L <= size) {
        some<2>(full, i);
        i += 2 * L;
      }
    }
    if constexpr (kSums > 1) {
      if (i + L <= size) {
        full(kSums / 2, i);
        i += L;
      }
    }
    if (i < size) part(kSums - 1, i, size - i);
  }

  // Writes make(offset), a vector, or make(offset, count), its first lanes, to each place of a run.
  template <class Make>
  INLINE void write_run(T* run, int64_t size, const Make& make) const {
    if (streamed) {
      const int64_t head = std::min(size, to_next_line(run));
      write(run, 0, head, make, [](T* p, V v) INLINE_LAMBDA { store(p, v); });
      write(run, head, size, make, [](T* p, V v) INLINE_LAMBDA { stream(p, v); });
    } else {
      write(run, 0, size, make, [](T* p, V v) INLINE_LAMBDA { store(p, v); });
    }
  }

  // Calls block(p) for each run of a chunk, cut to kRowsFlush values, and flush() between them.
  template <class Block, class Flush>
  static INLINE void each_block(const Chunk& chunk, int64_t stride, const Block& block,
                                const Flush& flush) {
    int64_t filled = 0;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      for (int64_t i = chunk.begin; i < chunk.end; i += kRowsFlush) {
        const int64_t size = std::min(kRowsFlush, chunk.end - i);
        if (filled + size > kRowsFlush) {
          flush();
          filled = 0;
        }
        block(run * stride + i, size);
        filled += size;
      }
    }
    flush();
  }

 private:
  template <int N, class Full>
  static INLINE void some(const Full& full, int64_t i) {
    [&]<int... k>(std::integer_sequence<int, k...>) INLINE_LAMBDA {
      (full(k, i + k * L), ...);
    }(std::make_integer_sequence<int, N>());
  }

  template <class Make, class Put>
  static INLINE void write(T* run, int64_t i, int64_t size, const Make& make, const Put& put) {
    for (; i + 4 * L <= size; i += 4 * L) {
      for (int k = 0; k < 4; ++k) put(run + i + k * L, make(i + k * L));
    }
    for (; i + L <= size; i += L) put(run + i, make(i));
    if (i < size) store(run + i, make(i, size - i), size - i);
  }
};

// Sums in some vectors of lanes, then in double. No array and no loop over them, for which GCC would
// keep them in memory; for the same reason all that adds to them is inlined.
template <class A>
struct LaneSums {
  Vec<A> first = splat(A(0)), second = first, third = first, fourth = first;
  double total = 0;

  INLINE void add(int sum, Vec<A> v) {
    (sum == 0 ? first : sum == 1 ? second : sum == 2 ? third : fourth) += v;
  }

  INLINE void flush() {
    if constexpr (kSums == 4) first = (first + second) + (third + fourth);
    if constexpr (kSums == 2) first += second;
    total += sum_lanes<A>(first);
    first = second = third = fourth = splat(A(0));
  }
};

template <class T>
struct RowsForward : RowsBase<T> {
  using Base = RowsBase<T>;
  using typename Base::A;
  using typename Base::Group;
  using typename Base::V;

  const T* input;
  T* output;
  ForwardStatistics statistics;

  RowsForward(const Problem& p, const T* input, T* output, const ForwardStatistics& s)
      : Base(p), input(input), output(output), statistics(s) {}

  // The mean of the first values of a chunk, to subtract before squaring.
  A head_mean(const T* p, int64_t stride, const Chunk& chunk) const {
    const int64_t values = std::max(kRowsMinHead, ceil_div(chunk.size(), kRowsHeadPart));
    const int64_t length = std::min(chunk.end - chunk.begin, values);
    const int64_t runs = std::min(chunk.last_run - chunk.first_run, ceil_div(values, length));
    LaneSums<A> sums;
    for (int64_t run = chunk.first_run; run < chunk.first_run + runs; ++run) {
      const T* q = p + run * stride + chunk.begin;
      Base::each_vector(
          length, [&](int sum, int64_t i) INLINE_LAMBDA { sums.add(sum, load(q + i)); },
          [&](int sum, int64_t i, int64_t count) INLINE_LAMBDA {
            sums.add(sum, load(q + i, count));
          });
    }
    sums.flush();
    return A(sums.total / double(runs * length));
  }

  void reduce(const Group& group, const Chunk& chunk, double* partial, double*) const {
    for (int64_t c = 0; c < group.channels; ++c) reduce_channel(group, c, chunk, partial + c);
  }

  void reduce_channel(const Group& group, int64_t channel, const Chunk& chunk,
                      double* partial) const {
    const T* p = input + group.offset + channel * this->problem.positions;
    const A shift = head_mean(p, group.stride, chunk);
    const V shifts = splat(shift);
    LaneSums<A> sums, squares;
    const auto add = [&](int sum, V d) INLINE_LAMBDA {
      sums.add(sum, d);
      squares.add(sum, d * d);
    };
    Base::each_block(
        chunk, group.stride,
        [&](int64_t start, int64_t size) INLINE_LAMBDA {
          const T* q = p + start;
          Base::each_vector(
              size, [&](int sum, int64_t i) INLINE_LAMBDA { add(sum, load(q + i) - shifts); },
              [&](int sum, int64_t i, int64_t count) INLINE_LAMBDA {
                add(sum, load(q + i, count) - splat(shift, count));
              });
        },
        [&]() INLINE_LAMBDA {
          sums.flush();
          squares.flush();
        });
    const double mean = sums.total / double(chunk.size());
    partial[0] = double(shift) + mean;
    partial[this->together] = not_negative(squares.total - sums.total * mean);
  }

  void finish(const Group& group, const double* partials, A* coefficients, double* work) const {
    const int64_t channels = group.channels, width = this->together;
    double count = 0, *mean = work, *m2 = work + width;
    std::fill_n(work, 2 * width, 0.0);
    for (int64_t i = 0; i < group.chunks.count(); ++i, partials += 2 * width) {
      const double size = double(group.chunks[i].size());
      merge_moments(channels, count, mean, m2, size, partials, partials + width, 1);
      count += size;
    }
    statistics.finish(group.rank, group.channel, channels, count, mean, m2, coefficients, width);
  }

  void apply(const Group& group, const Chunk& chunk, const A* coefficients) const {
    for (int64_t c = 0; c < group.channels; ++c) apply_channel(group, c, chunk, coefficients + c);
  }

  void apply_channel(const Group& group, int64_t channel, const Chunk& chunk,
                     const A* coefficients) const {
    const int64_t width = this->together;
    const V mean = splat(coefficients[0]), scale = splat(coefficients[width]);
    const V shift = splat(coefficients[2 * width]);
    const int64_t offset = group.offset + channel * this->problem.positions + chunk.begin;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      const int64_t start = offset + run * group.stride;
      const auto make = [&](int64_t i, auto... count) INLINE_LAMBDA {
        return (load(input + start + i, count...) - mean) * scale + shift;
      };
      this->write_run(output + start, chunk.end - chunk.begin, make);
    }
  }
};

template <class T>
struct RowsBackward : RowsBase<T> {
  using Base = RowsBase<T>;
  using typename Base::A;
  using typename Base::Group;
  using typename Base::V;

  const T* grad_output;
  const T* input;
  T* grad_input;
  BackwardStatistics statistics;

  RowsBackward(const Problem& p, const T* grad_output, const T* input, T* grad_input,
               const BackwardStatistics& s)
      : Base(p), grad_output(grad_output), input(input), grad_input(grad_input), statistics(s) {}

  void reduce(const Group& group, const Chunk& chunk, double* partial, double* work) const {
    statistics.mean.load(group.rank, group.channel, group.channels, work);
    for (int64_t c = 0; c < group.channels; ++c) {
      reduce_channel(group, c, chunk, A(work[c]), partial + c);
    }
  }

  void reduce_channel(const Group& group, int64_t channel, const Chunk& chunk, A saved_mean,
                      double* partial) const {
    const V mean = splat(saved_mean);
    LaneSums<A> sums, products;
    const int64_t offset = group.offset + channel * this->problem.positions;
    const T* x = input + offset;
    const T* dy = grad_output + offset;
    Base::each_block(
        chunk, group.stride,
        [&](int64_t start, int64_t size) INLINE_LAMBDA {
          const T* p = x + start;
          const T* q = dy + start;
          Base::each_vector(
              size,
              [&](int sum, int64_t i) INLINE_LAMBDA {
                const V g = load(q + i);
                sums.add(sum, g);
                products.add(sum, g * (load(p + i) - mean));
              },
              [&](int sum, int64_t i, int64_t count) INLINE_LAMBDA {
                const V g = load(q + i, count);
                const V d = load(p + i, count) - splat(saved_mean, count);
                sums.add(sum, g);
                products.add(sum, g * d);
              });
        },
        [&]() INLINE_LAMBDA {
          sums.flush();
          products.flush();
        });
    partial[0] = sums.total;
    partial[this->together] = products.total;
  }

  void finish(const Group& group, const double* partials, A* coefficients, double* work) const {
    const int64_t width = this->together;
    std::fill_n(work, 2 * width, 0.0);
    for (int64_t i = 0; i < group.chunks.count(); ++i, partials += 2 * width) {
      for (int64_t j = 0; j < 2 * width; ++j) work[j] += partials[j];
    }
    statistics.finish(group.rank, group.channel, group.channels, group.chunks.size(), work,
                      work + width, coefficients, width);
  }

  void apply(const Group& group, const Chunk& chunk, const A* coefficients) const {
    for (int64_t c = 0; c < group.channels; ++c) apply_channel(group, c, chunk, coefficients + c);
  }

  void apply_channel(const Group& group, int64_t channel, const Chunk& chunk,
                     const A* coefficients) const {
    const int64_t width = this->together;
    const V mean = splat(coefficients[0]), scale = splat(coefficients[width]);
    const V slope = splat(coefficients[2 * width]), constant = splat(coefficients[3 * width]);
    const int64_t offset = group.offset + channel * this->problem.positions + chunk.begin;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      const int64_t start = offset + run * group.stride;
      const auto make = [&](int64_t i, auto... count) INLINE_LAMBDA {
        const V x = load(input + start + i, count...), dy = load(grad_output + start + i, count...);
        return (x - mean) * slope + (dy * scale + constant);
      };
      this->write_run(grad_input + start, chunk.end - chunk.begin, make);
    }
  }
};

}  // namespace distbn

// Inputs laid out as [N, S, C] (channels_last, or S = 1), where the channels are neighbours, and
// those laid out as [N, C, S] with so few positions that runs of them would waste the lanes.
// A group is a block of columns of one rank; its mean, scale and shift are arrays.
#pragma once

#include "schedule.h"
#include "simd.h"
#include "statistics.h"

namespace distbn {

constexpr int64_t kColumnsChunk = 65536;
constexpr int64_t kMinChunkRows = 256;
constexpr int64_t kMaxColumns = 1024;
constexpr int64_t kWide = 512;
// A chunk's shift is the mean of this part of its rows.
constexpr int64_t kHeadPart = 16;
// Rows summed in float32 before the sums go to double.
constexpr int64_t kFlushRows = 64;
// Bytes of a group that stay in the second-level cache until they are read again.
constexpr int64_t kCacheBytes = 512 * 1024;

// Up to this many positions an input laid out as [N, C, S] is taken as rows of C * S columns.
constexpr int64_t kFewPositions = 32;

// Rows of `width` columns, cut into blocks. A channel has `fold` columns: if channels come last and
// are few, several positions make a row; if positions come last, all of them do.
// Wide rows are cut so that a group stays in the cache; others are read whole, which the
// prefetcher likes better.
struct Grid {
  int64_t fold, width, block, blocks;
  int64_t fold_step, channel_step;  // from a column of a channel to its next, and to the next channel

  Grid(const Problem& p, int64_t bytes_per_value, bool channels_last) {
    fold = !channels_last ? p.positions : p.channels < 16 ? folding(p) : 1;
    fold_step = channels_last ? p.channels : 1;
    channel_step = channels_last ? 1 : fold;
    width = p.channels * fold;
    const int64_t rows = std::max<int64_t>(1, ceil_div(p.samples, p.ranks) * p.positions / fold);
    const int64_t fitting = kCacheBytes / (rows * bytes_per_value) / 64 * 64;
    block = width;
    if (width >= kWide && fitting >= 64) block = std::min(block, fitting);
    block = std::min(block, kMaxColumns);
    if (!channels_last) block = std::max(block / fold * fold, fold);
    if (channels_last && fold > 1) block = width;
    blocks = ceil_div(width, block);
  }

 private:
  // The smallest divisor of the positions that makes rows of 32 columns or more.
  static int64_t folding(const Problem& p) {
    for (int64_t fold = 1; fold <= p.positions && fold * p.channels <= kMaxColumns; ++fold) {
      if (p.positions % fold == 0 && fold * p.channels >= 32) return fold;
    }
    return 1;
  }
};

template <class T>
struct ColumnsBase {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  Problem problem;
  Grid grid;
  int64_t padded, groups, max_chunks, partial_size, coefficient_size, work_size;

  ColumnsBase(const Problem& p, int64_t tensors, int64_t coefficients, bool channels_last)
      : problem(p),
        grid(p, tensors * int64_t(sizeof(T)), channels_last),
        padded(ceil_div(grid.block, L) * L),
        groups(p.ranks * grid.blocks),
        max_chunks(group(0).chunks.count()),
        partial_size(2 * padded),
        coefficient_size(coefficients * padded),
        work_size(6 * padded) {}

  // Columns of one rank: runs of `length` rows that are row_stride apart.
  struct Group {
    int64_t rank, first_column, columns, offset, run_stride, row_stride;
    Chunks chunks;
  };

  Group group(int64_t index) const {
    const int64_t rank = index / grid.blocks, column = index % grid.blocks * grid.block;
    const Share share(problem, rank);
    const int64_t sample = problem.channels * problem.positions;
    const int64_t rows = problem.positions / grid.fold, step = share.step * sample;
    const bool even = share.step == 1 || rows == 1;  // all rows equally far apart: one run
    return {rank, column, std::min(grid.block, grid.width - column),
            share.first * sample + column, step, rows == 1 ? step : grid.width,
            Chunks(even ? 1 : share.count,
                   Cut(even ? share.count * rows : rows,
                       std::max(kMinChunkRows, kColumnsChunk / grid.block)))};
  }

  int64_t channels(const Group& g) const { return g.columns / grid.fold; }
  int64_t first_channel(const Group& g) const { return g.first_column / grid.fold; }

  // Calls work(offset) with the first column of each fold; channels are grid.channel_step apart.
  template <class Work>
  void each_fold(const Work& work) const {
    for (int64_t f = 0; f < grid.fold; ++f) work(f * grid.fold_step);
  }

  // Gives each column the value of its channel, in each of some rows.
  template <class X, class Y>
  void unfold(const Group& g, int64_t rows, const X* values, Y* columns) const {
    const int64_t count = channels(g);
    for (int64_t row = 0; row < rows; ++row, values += count, columns += padded) {
      each_fold([&](int64_t fold) {
        for (int64_t c = 0; c < count; ++c) columns[fold + c * grid.channel_step] = Y(values[c]);
      });
    }
  }

  // Calls rows(std::integral_constant<int, R>, offset) for R = 8 rows or 1, flush() between. Whole
  // rows are taken one by one; of cut rows, which are far apart, eight at once keep memory busy, and
  // of very short ones they keep the sums in registers.
  template <class Rows, class Flush>
  INLINE void each_rows(const Group& g, const Chunk& chunk, const Rows& rows,
                        const Flush& flush) const {
    const bool cut = grid.blocks > 1 || grid.block <= 32;
    int64_t filled = 0;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      const int64_t start = g.offset + run * g.run_stride;
      for (int64_t i = chunk.begin; i < chunk.end;) {
        const int64_t step = cut && i + 8 <= chunk.end ? 8 : 1;
        if (step == 8) {
          rows(std::integral_constant<int, 8>(), start + i * g.row_stride);
        } else {
          rows(std::integral_constant<int, 1>(), start + i * g.row_stride);
        }
        i += step;
        filled += step;
        if (filled >= kFlushRows) {
          flush();
          filled = 0;
        }
      }
    }
    flush();
  }

  // Calls columns(i, load, store) for each vector of columns; the last one may be part of one.
  template <class Columns>
  static INLINE void each_vector(int64_t columns, const Columns& body) {
    int64_t i = 0;
    for (; i + L <= columns; i += L) {
      body(
          i, [](const T* p) INLINE_LAMBDA { return load(p); },
          [](T* p, V v) INLINE_LAMBDA { store(p, v); });
    }
    if (const int64_t rest = columns - i) {
      body(
          i, [=](const T* p) INLINE_LAMBDA { return load(p, rest); },
          [=](T* p, V v) INLINE_LAMBDA { store(p, v, rest); });
    }
  }
};

// Two sums per column, in float32 for some rows and then in double; in 4 * size doubles of scratch.
template <class A>
struct ColumnSums {
  int64_t size;
  double *total_a, *total_b;
  A *a, *b;

  ColumnSums(int64_t size, double* work)
      : size(size),
        total_a(work),
        total_b(work + size),
        a(reinterpret_cast<A*>(work + 2 * size)),
        b(reinterpret_cast<A*>(work + 3 * size)) {
    std::fill_n(work, 2 * size, 0.0);
    std::fill_n(a, size, A(0));
    std::fill_n(b, size, A(0));
  }

  void flush() {
    for (int64_t i = 0; i < size; ++i) {
      total_a[i] += double(a[i]);
      total_b[i] += double(b[i]);
      a[i] = b[i] = 0;
    }
  }
};

template <class T>
struct ColumnsForward : ColumnsBase<T> {
  using Base = ColumnsBase<T>;
  using typename Base::A;
  using typename Base::Group;
  using typename Base::V;

  const T* input;
  T* output;
  ForwardStatistics statistics;

  ColumnsForward(const Problem& p, bool channels_last, const T* input, T* output,
                 const ForwardStatistics& s)
      : Base(p, 1, 3, channels_last), input(input), output(output), statistics(s) {}

  // The means of the first rows of a chunk, to subtract before squaring.
  void head_means(const Group& g, Chunk chunk, A* means) const {
    const int64_t rows = chunk.end - chunk.begin;
    if (chunk.last_run - chunk.first_run >= kHeadPart) {
      chunk.last_run = chunk.first_run + ceil_div(chunk.last_run - chunk.first_run, kHeadPart);
    } else {
      chunk.end = chunk.begin + std::min(rows, std::max<int64_t>(8, ceil_div(rows, kHeadPart)));
      chunk.last_run = chunk.first_run + 1;
    }
    std::fill_n(means, this->padded, A(0));
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto) {
            V sum = distbn::load(&means[i]);
            for (int r = 0; r < unroll; ++r) sum += load(input + start + r * g.row_stride + i);
            distbn::store(&means[i], sum);
          });
        },
        [] {});
    for (int64_t i = 0; i < g.columns; ++i) means[i] /= A(chunk.size());
  }

  void reduce(const Group& g, const Chunk& chunk, double* partial, double* work) const {
    ColumnSums<A> sums(this->padded, work);
    A* shifts = reinterpret_cast<A*>(work + 4 * this->padded);
    head_means(g, chunk, shifts);
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto) {
            const V shift = distbn::load(&shifts[i]);
            V sum{}, square{};
            for (int r = 0; r < unroll; ++r) {
              const V d = load(input + start + r * g.row_stride + i) - shift;
              sum += d;
              square += d * d;
            }
            distbn::store(&sums.a[i], distbn::load(&sums.a[i]) + sum);
            distbn::store(&sums.b[i], distbn::load(&sums.b[i]) + square);
          });
        },
        [&] { sums.flush(); });
    const double count = double(chunk.size());
    for (int64_t i = 0; i < g.columns; ++i) {
      const double mean = sums.total_a[i] / count;
      partial[i] = double(shifts[i]) + mean;
      partial[this->padded + i] = not_negative(sums.total_b[i] - sums.total_a[i] * mean);
    }
  }

  void finish(const Group& g, const double* partials, A* coefficients, double* work) const {
    const int64_t channels = this->channels(g);
    double *mean = work, *m2 = work + channels;
    std::fill_n(work, 2 * channels, 0.0);
    double merged = 0;
    for (int64_t k = 0; k < g.chunks.count(); ++k, partials += this->partial_size) {
      const double count = double(g.chunks[k].size());
      this->each_fold([&](int64_t fold) {
        merge_moments(channels, merged, mean, m2, count, partials + fold,
                      partials + this->padded + fold, this->grid.channel_step);
        merged += count;
      });
    }
    A* found = reinterpret_cast<A*>(work + 2 * channels);
    statistics.finish(g.rank, this->first_channel(g), channels, merged, mean, m2,
                      found, channels);
    this->unfold(g, 3, found, coefficients);
  }

  void apply(const Group& g, const Chunk& chunk, const A* coefficients) const {
    const int64_t padded = this->padded;
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto store) {
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V shift = distbn::load(coefficients + 2 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * g.row_stride + i;
              store(output + at, (load(input + at) - mean) * scale + shift);
            }
          });
        },
        [] {});
  }
};

template <class T>
struct ColumnsBackward : ColumnsBase<T> {
  using Base = ColumnsBase<T>;
  using typename Base::A;
  using typename Base::Group;
  using typename Base::V;

  const T* grad_output;
  const T* input;
  T* grad_input;
  BackwardStatistics statistics;

  ColumnsBackward(const Problem& p, bool channels_last, const T* grad_output, const T* input,
                  T* grad_input, const BackwardStatistics& s)
      : Base(p, 2, 4, channels_last),
        grad_output(grad_output),
        input(input),
        grad_input(grad_input),
        statistics(s) {}

  void reduce(const Group& g, const Chunk& chunk, double* partial, double* work) const {
    A* means = reinterpret_cast<A*>(work + 4 * this->padded);
    double* saved = work + 5 * this->padded;
    statistics.mean.load(g.rank, this->first_channel(g), this->channels(g), saved);
    this->unfold(g, 1, saved, means);
    ColumnSums<A> sums(this->padded, work);
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto) {
            const V mean = distbn::load(&means[i]);
            V sum{}, product{};
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * g.row_stride + i;
              const V dy = load(grad_output + at);
              sum += dy;
              product += dy * (load(input + at) - mean);
            }
            distbn::store(&sums.a[i], distbn::load(&sums.a[i]) + sum);
            distbn::store(&sums.b[i], distbn::load(&sums.b[i]) + product);
          });
        },
        [&] { sums.flush(); });
    std::copy_n(sums.total_a, g.columns, partial);
    std::copy_n(sums.total_b, g.columns, partial + this->padded);
  }

  void finish(const Group& g, const double* partials, A* coefficients, double* work) const {
    const int64_t channels = this->channels(g), step = this->grid.channel_step;
    double *sum_dy = work, *sum_dy_x = work + channels;
    std::fill_n(work, 2 * channels, 0.0);
    for (int64_t k = 0; k < g.chunks.count(); ++k, partials += this->partial_size) {
      this->each_fold([&](int64_t fold) {
        const double* sums = partials + fold;
        for (int64_t c = 0; c < channels; ++c) {
          sum_dy[c] += sums[c * step];
          sum_dy_x[c] += sums[this->padded + c * step];
        }
      });
    }
    A* found = reinterpret_cast<A*>(work + 2 * channels);
    const double count = g.chunks.size() * double(this->grid.fold);
    statistics.finish(g.rank, this->first_channel(g), channels, count, sum_dy,
                      sum_dy_x, found, channels);
    this->unfold(g, 4, found, coefficients);
  }

  void apply(const Group& g, const Chunk& chunk, const A* coefficients) const {
    const int64_t padded = this->padded;
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto store) {
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V slope = distbn::load(coefficients + 2 * padded + i);
            const V offset = distbn::load(coefficients + 3 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * g.row_stride + i;
              const V dy = load(grad_output + at);
              store(grad_input + at, (load(input + at) - mean) * slope + (dy * scale + offset));
            }
          });
        },
        [] {});
  }
};

}  // namespace distbn

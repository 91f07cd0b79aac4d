// Inputs laid out as [N, S, C] (channels_last, or S = 1): the channels are neighbours.
// A group is a block of columns of one rank; its mean, scale and shift are arrays.
#pragma once

#include "schedule.h"
#include "simd.h"
#include "statistics.h"

namespace distbn {

constexpr int64_t kColumnsChunk = 65536;
constexpr int64_t kMinChunkRows = 256;
constexpr int64_t kMaxColumns = 1024;
// A chunk's shift is the mean of this part of its rows.
constexpr int64_t kHeadPart = 16;
// Rows summed in float32 before the sums go to double.
constexpr int64_t kFlushRows = 128;
// Bytes of a group that stay in the second-level cache until they are read again.
constexpr int64_t kCacheBytes = 512 * 1024;

// Rows of `width` columns. Few channels are widened: `fold` positions make one row.
struct Grid {
  int64_t fold, width, block, blocks;

  Grid(const Problem& p, int64_t bytes_per_value) : fold(1) {
    if (p.channels < 16) fold = folding(p);
    width = p.channels * fold;
    const int64_t rows = ceil_div(p.samples, p.ranks) * p.positions / fold;
    const int64_t fitting = kCacheBytes / (std::max<int64_t>(1, rows) * bytes_per_value) / 64 * 64;
    block = fold > 1 ? width : std::min(width, fitting >= 64 ? fitting : kMaxColumns);
    block = std::min(block, kMaxColumns);
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
  int64_t padded, groups, max_chunks, partial_size, coefficient_size;

  ColumnsBase(const Problem& p, int64_t tensors, int64_t coefficients)
      : problem(p),
        grid(p, tensors * int64_t(sizeof(T))),
        padded(ceil_div(grid.block, L) * L),
        groups(p.ranks * grid.blocks),
        max_chunks(chunks(0).count()),
        partial_size(2 * padded),
        coefficient_size(coefficients * padded) {}

  // Where a group's rows are: runs of rows that are row_stride apart.
  struct Layout {
    int64_t offset, runs, run_stride, length, row_stride, first_column, columns;
  };

  Layout layout(int64_t group) const {
    const Share share(problem, group / grid.blocks);
    const int64_t sample = problem.channels * problem.positions;
    const int64_t column = group % grid.blocks * grid.block;
    const int64_t rows = problem.positions / grid.fold;
    Layout l{share.first * sample + column, share.count, share.step * sample, rows, grid.width,
             column, std::min(grid.block, grid.width - column)};
    if (share.step == 1 || rows == 1) {  // one run of all rows
      l.row_stride = rows == 1 ? l.run_stride : grid.width;
      l.length = share.count * rows;
      l.runs = 1;
    }
    return l;
  }

  Chunks chunks(int64_t group) const {
    const Layout l = layout(group);
    return Chunks(l.runs, l.length, std::max(kMinChunkRows, kColumnsChunk / grid.block));
  }

  int64_t channel(int64_t first_column, int64_t column) const {
    return (first_column + column) % problem.channels;
  }

  // Calls rows(std::integral_constant<int, R>, offset) for R = 8 rows or 1, flush() between.
  template <class Rows, class Flush>
  static INLINE void each_rows(const Layout& l, const Chunk& chunk, const Rows& rows,
                               const Flush& flush) {
    int64_t filled = 0;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      const int64_t start = l.offset + run * l.run_stride;
      for (int64_t i = chunk.begin; i < chunk.end;) {
        const bool eight = i + 8 <= chunk.end;
        if (eight) {
          rows(std::integral_constant<int, 8>(), start + i * l.row_stride);
        } else {
          rows(std::integral_constant<int, 1>(), start + i * l.row_stride);
        }
        i += eight ? 8 : 1;
        filled += eight ? 8 : 1;
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

// Two sums per column, in float32 for some rows and then in double.
template <class A>
struct ColumnSums {
  int64_t size;
  std::vector<A> a, b;
  std::vector<double> total_a, total_b;

  explicit ColumnSums(int64_t size) : size(size), a(size), b(size), total_a(size), total_b(size) {}

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
  using typename Base::Layout;
  using typename Base::V;

  const T* input;
  T* output;
  ForwardStatistics statistics;

  ColumnsForward(const Problem& p, const T* input, T* output, const ForwardStatistics& s)
      : Base(p, 1, 3), input(input), output(output), statistics(s) {}

  // The means of the first rows of a chunk, to subtract before squaring.
  std::vector<A> head_means(const Layout& l, Chunk chunk) const {
    const int64_t rows = chunk.end - chunk.begin;
    if (chunk.last_run - chunk.first_run >= kHeadPart) {
      chunk.last_run = chunk.first_run + ceil_div(chunk.last_run - chunk.first_run, kHeadPart);
    } else {
      chunk.end = chunk.begin + std::min(rows, std::max<int64_t>(8, ceil_div(rows, kHeadPart)));
      chunk.last_run = chunk.first_run + 1;
    }
    std::vector<A> means(this->padded);
    Base::each_rows(
        l, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(l.columns, [&](int64_t i, auto load, auto) {
            V sum = distbn::load(&means[i]);
            for (int r = 0; r < unroll; ++r) sum += load(input + start + r * l.row_stride + i);
            distbn::store(&means[i], sum);
          });
        },
        [] {});
    for (auto& mean : means) mean /= A(chunk.size());
    return means;
  }

  void reduce(int64_t group, const Chunk& chunk, double* partial) const {
    const Layout l = this->layout(group);
    const std::vector<A> shifts = head_means(l, chunk);
    ColumnSums<A> sums(this->padded);
    Base::each_rows(
        l, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(l.columns, [&](int64_t i, auto load, auto) {
            const V shift = distbn::load(&shifts[i]);
            V sum{}, square{};
            for (int r = 0; r < unroll; ++r) {
              const V d = load(input + start + r * l.row_stride + i) - shift;
              sum += d;
              square += d * d;
            }
            distbn::store(&sums.a[i], distbn::load(&sums.a[i]) + sum);
            distbn::store(&sums.b[i], distbn::load(&sums.b[i]) + square);
          });
        },
        [&] { sums.flush(); });
    const double count = double(chunk.size());
    for (int64_t i = 0; i < l.columns; ++i) {
      const double mean = sums.total_a[i] / count;
      partial[i] = double(shifts[i]) + mean;
      partial[this->padded + i] = not_negative(sums.total_b[i] - sums.total_a[i] * mean);
    }
  }

  void finish(int64_t group, const double* partials, A* coefficients) const {
    const Layout l = this->layout(group);
    const Chunks chunks = this->chunks(group);
    const int64_t rank = group / this->grid.blocks, padded = this->padded;
    const int64_t channels = std::min(l.columns, this->problem.channels);
    std::vector<Moments> moments(channels);
    for (int64_t k = 0; k < chunks.count(); ++k, partials += this->partial_size) {
      const double count = double(chunks[k].size());
      for (int64_t i = 0; i < l.columns; ++i) {
        moments[i % channels].merge(count, partials[i], partials[padded + i]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const auto found = statistics.finish<A>(rank, l.first_column + c, moments[c]);
      for (int64_t i = c; i < l.columns; i += channels) {
        coefficients[i] = found.mean;
        coefficients[padded + i] = found.scale;
        coefficients[2 * padded + i] = found.shift;
      }
    }
  }

  void apply(int64_t group, const Chunk& chunk, const A* coefficients) const {
    const Layout l = this->layout(group);
    const int64_t padded = this->padded;
    Base::each_rows(
        l, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(l.columns, [&](int64_t i, auto load, auto store) {
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V shift = distbn::load(coefficients + 2 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * l.row_stride + i;
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
  using typename Base::Layout;
  using typename Base::V;

  const T* grad_output;
  const T* input;
  T* grad_input;
  BackwardStatistics statistics;

  ColumnsBackward(const Problem& p, const T* grad_output, const T* input, T* grad_input,
                  const BackwardStatistics& s)
      : Base(p, 2, 4),
        grad_output(grad_output),
        input(input),
        grad_input(grad_input),
        statistics(s) {}

  void reduce(int64_t group, const Chunk& chunk, double* partial) const {
    const Layout l = this->layout(group);
    const int64_t rank = group / this->grid.blocks;
    std::vector<A> means(this->padded);
    for (int64_t i = 0; i < l.columns; ++i) {
      means[i] = A(statistics.mean.get(rank, this->channel(l.first_column, i)));
    }
    ColumnSums<A> sums(this->padded);
    Base::each_rows(
        l, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(l.columns, [&](int64_t i, auto load, auto) {
            const V mean = distbn::load(&means[i]);
            V sum{}, product{};
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * l.row_stride + i;
              const V g = load(grad_output + at);
              sum += g;
              product += g * (load(input + at) - mean);
            }
            distbn::store(&sums.a[i], distbn::load(&sums.a[i]) + sum);
            distbn::store(&sums.b[i], distbn::load(&sums.b[i]) + product);
          });
        },
        [&] { sums.flush(); });
    std::copy_n(sums.total_a.begin(), l.columns, partial);
    std::copy_n(sums.total_b.begin(), l.columns, partial + this->padded);
  }

  void finish(int64_t group, const double* partials, A* coefficients) const {
    const Layout l = this->layout(group);
    const Chunks chunks = this->chunks(group);
    const int64_t rank = group / this->grid.blocks, padded = this->padded;
    const int64_t channels = std::min(l.columns, this->problem.channels);
    std::vector<double> sum_dy(channels), sum_dy_x(channels);
    for (int64_t k = 0; k < chunks.count(); ++k, partials += this->partial_size) {
      for (int64_t i = 0; i < l.columns; ++i) {
        sum_dy[i % channels] += partials[i];
        sum_dy_x[i % channels] += partials[padded + i];
      }
    }
    const double count = double(l.runs * l.length * this->grid.fold);
    for (int64_t c = 0; c < channels; ++c) {
      const auto found =
          statistics.finish<A>(rank, l.first_column + c, count, sum_dy[c], sum_dy_x[c]);
      for (int64_t i = c; i < l.columns; i += channels) {
        coefficients[i] = found.mean;
        coefficients[padded + i] = found.scale;
        coefficients[2 * padded + i] = found.slope;
        coefficients[3 * padded + i] = found.offset;
      }
    }
  }

  void apply(int64_t group, const Chunk& chunk, const A* coefficients) const {
    const Layout l = this->layout(group);
    const int64_t padded = this->padded;
    Base::each_rows(
        l, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(l.columns, [&](int64_t i, auto load, auto store) {
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V slope = distbn::load(coefficients + 2 * padded + i);
            const V offset = distbn::load(coefficients + 3 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * l.row_stride + i;
              const V dy = load(grad_output + at);
              store(grad_input + at, (load(input + at) - mean) * slope + (dy * scale + offset));
            }
          });
        },
        [] {});
  }
};

}  // namespace distbn

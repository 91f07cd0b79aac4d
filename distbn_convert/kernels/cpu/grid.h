// How columns.h sees an input: rows of columns, blocks of columns, runs of rows.
#pragma once

#include "schedule.h"
#include "simd.h"

namespace distbn {

constexpr int64_t kColumnsChunk = 65536;
constexpr int64_t kMinChunkRows = 256;
// Their sums and shifts fill most of the first-level cache. Narrower blocks, even ones that fit in the
// second-level cache, take longer: the prefetchers want whole rows.
constexpr int64_t kMaxColumns = 2048;
// Of what the second-level cache holds: sums and statistics of so many stay in the first.
constexpr int64_t kCachedColumns = 256;
// A chunk's shift is the mean of this part of its rows, but of so many at least: of a few rows, one
// may be far from the others.
constexpr int64_t kHeadPart = 16;
constexpr int64_t kMinHead = 16;
// Rows summed in float32 before the sums go to double.
constexpr int64_t kFlushRows = 64;
// Rows taken at once, so that a vector of sums or coefficients serves several.
constexpr int kRowsAtOnce = 4;
// The same for rows of up to kNarrow columns, and for what the second-level cache holds.
constexpr int kShortRowsAtOnce = 8;
constexpr int64_t kNarrow = 32;
// Bytes that stay in the second-level cache until they are read again.
constexpr int64_t kCacheBytes = 512 * 1024;

// Up to this many positions an input laid out as [N, C, S] is taken as rows of C * S columns. Measured
// with AVX-512 and with AVX2; the longer a machine's vectors, the more lanes a short run leaves empty.
constexpr int64_t kFewPositions = kNativeBytes == 64 ? 32 : 15;
// But what a rank does once for each of its columns takes as long as so many rows: with few samples to
// a rank, half as many positions already pay for runs.
constexpr int64_t kRowsToStart = 4;

// Whether an input is taken as rows of columns.
inline bool takes_columns(const Problem& p, bool channels_last) {
  const int64_t rows = ceil_div(p.samples, p.ranks) + kRowsToStart;
  return channels_last || p.positions <= std::min(kFewPositions, 2 * rows - 1);
}

// Rows of `width` columns, cut into blocks. A channel has `fold` columns: if channels come last and
// are few, several positions make a row; if positions come last, all of them do.
struct Grid {
  int64_t fold, width, block, blocks;
  int64_t fold_step, channel_step;  // from a column of a channel to its next, and to the next channel

  Grid(const Problem& p, int64_t bytes_per_value, bool channels_last) {
    fold = !channels_last ? p.positions : p.channels < 16 ? folding(p) : 1;
    fold_step = channels_last ? p.channels : 1;
    channel_step = channels_last ? 1 : fold;
    width = p.channels * fold;
    const bool cached = p.size() * bytes_per_value <= kCacheBytes;
    block = std::min(width, cached && fold == 1 ? kCachedColumns : kMaxColumns);
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
  bool streamed;  // only where no cache line is shared between rows or blocks

  ColumnsBase(const Problem& p, int64_t tensors, int64_t coefficients, bool channels_last,
              const T* output)
      : problem(p),
        grid(p, tensors * int64_t(sizeof(T)), channels_last),
        padded(ceil_div(grid.block, L) * L),
        groups(p.ranks * grid.blocks),
        max_chunks(group(0).chunks.count()),
        partial_size(2 * padded),
        coefficient_size(coefficients * padded + L),
        work_size(6 * padded + L),
        streamed(streams<T>(p) && to_next_line(output) == 0 &&
                 grid.width * int64_t(sizeof(T)) % kLineBytes == 0 &&
                 grid.block * int64_t(sizeof(T)) % kLineBytes == 0) {}

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

  // Gives each column the value of its channel, in each of some rows. Where a channel's columns are
  // neighbours they are written in whole vectors, of which the next channel overwrites what is too
  // much; so up to L values behind the last row are written as well.
  template <class X>
  void unfold(const Group& g, int64_t rows, const X* values, A* columns) const {
    const int64_t count = channels(g);
    for (int64_t row = 0; row < rows; ++row, values += count, columns += padded) {
      if (grid.channel_step == 1) {
        each_fold([&](int64_t fold) {
          for (int64_t c = 0; c < count; ++c) columns[fold + c] = A(values[c]);
        });
      } else {
        for (int64_t c = 0; c < count; ++c) {
          const V value = splat(A(values[c]));
          for (int64_t f = 0; f < grid.fold; f += L) store(columns + c * grid.fold + f, value);
        }
      }
    }
  }

  // Calls rows(std::integral_constant<int, R>, offset) for R rows, flush() between.
  template <class Rows, class Flush>
  INLINE void each_rows(const Group& g, const Chunk& chunk, const Rows& rows,
                        const Flush& flush) const {
    const bool cached = problem.size() * int64_t(sizeof(T)) <= kCacheBytes;
    const int64_t most = grid.block <= kNarrow || cached ? kShortRowsAtOnce : kRowsAtOnce;
    int64_t filled = 0;
    for (int64_t run = chunk.first_run; run < chunk.last_run; ++run) {
      const int64_t start = g.offset + run * g.run_stride;
      for (int64_t i = chunk.begin; i < chunk.end;) {
        const int64_t at = start + i * g.row_stride, step = i + most <= chunk.end ? most : 1;
        if (step == kShortRowsAtOnce) {
          rows(std::integral_constant<int, kShortRowsAtOnce>(), at);
        } else if (step == kRowsAtOnce) {
          rows(std::integral_constant<int, kRowsAtOnce>(), at);
        } else {
          rows(std::integral_constant<int, 1>(), at);
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

  // Fetches a part of the next R rows into the cache for column i of these. Several rows of one page
  // at once confuse the prefetchers, so it goes in the order of memory; where rows are cut, from the
  // same columns. Past the end it fetches nothing, or what nobody reads.
  template <int R>
  INLINE void fetch(std::integral_constant<int, R>, const T* rows, int64_t i, int64_t stride) const {
    constexpr int64_t kLine = kLineBytes / int64_t(sizeof(T));
    if constexpr (R == kRowsAtOnce) {
      if (grid.blocks == 1) {
        const T* next = rows + R * stride + R * i;
        for (int64_t k = 0; k < R * L; k += kLine) __builtin_prefetch(next + k);
      } else if (i % kLine == 0) {
        for (int64_t r = 0; r < R; ++r) __builtin_prefetch(rows + (R + r) * stride + i);
      }
    }
  }

  // Calls columns(i, load, store) for each vector of columns; the last one may be part of one.
  template <class Columns>
  static INLINE void each_vector(int64_t columns, const Columns& body, bool streamed = false) {
    const auto whole = [](const T* p) INLINE_LAMBDA { return load(p); };
    int64_t i = 0;
    if (streamed) {
      for (; i + L <= columns; i += L) body(i, whole, [](T* p, V v) INLINE_LAMBDA { stream(p, v); });
    }
    for (; i + L <= columns; i += L) body(i, whole, [](T* p, V v) INLINE_LAMBDA { store(p, v); });
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

}  // namespace distbn

// Inputs laid out as [N, S, C] (channels_last, or S = 1), where the channels are neighbours, and
// those laid out as [N, C, S] with so few positions that runs of them would waste the lanes.
// A group is a block of columns of one rank; its mean, scale and shift are arrays.
#pragma once

#include "grid.h"
#include "statistics.h"

namespace distbn {

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
      : Base(p, 1, 3, channels_last, output), input(input), output(output), statistics(s) {}

  // The means of the first rows of a chunk, to subtract before squaring.
  void head_means(const Group& g, Chunk chunk, A* means) const {
    const int64_t rows = std::max(kMinHead, ceil_div(chunk.size(), kHeadPart));
    const int64_t length = std::min(chunk.end - chunk.begin, rows);
    const int64_t runs = std::min(chunk.last_run - chunk.first_run, ceil_div(rows, length));
    chunk.end = chunk.begin + length;
    chunk.last_run = chunk.first_run + runs;
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
    const A part = A(1) / A(chunk.size());
    for (int64_t i = 0; i < g.columns; ++i) means[i] *= part;
  }

  void reduce(const Group& g, const Chunk& chunk, double* partial, double* work) const {
    ColumnSums<A> sums(this->padded, work);
    A* shifts = reinterpret_cast<A*>(work + 4 * this->padded);
    head_means(g, chunk, shifts);
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto) {
            this->fetch(unroll, input + start, i, g.row_stride);
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
    const double part = 1 / double(chunk.size());
    for (int64_t i = 0; i < g.columns; ++i) {
      const double mean = sums.total_a[i] * part;
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
            this->fetch(unroll, input + start, i, g.row_stride);
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V shift = distbn::load(coefficients + 2 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * g.row_stride + i;
              store(output + at, (load(input + at) - mean) * scale + shift);
            }
          },
          this->streamed);
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
      : Base(p, 2, 4, channels_last, grad_input),
        grad_output(grad_output),
        input(input),
        grad_input(grad_input),
        statistics(s) {}

  void reduce(const Group& g, const Chunk& chunk, double* partial, double* work) const {
    double* saved = work + 4 * this->padded;
    A* means = reinterpret_cast<A*>(work + 5 * this->padded);
    statistics.mean.load(g.rank, this->first_channel(g), this->channels(g), saved);
    this->unfold(g, 1, saved, means);
    ColumnSums<A> sums(this->padded, work);
    this->each_rows(
        g, chunk,
        [&](auto unroll, int64_t start) {
          Base::each_vector(g.columns, [&](int64_t i, auto load, auto) {
            this->fetch(unroll, grad_output + start, i, g.row_stride);
            this->fetch(unroll, input + start, i, g.row_stride);
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
    const int64_t channels = this->channels(g);
    double *sum_dy = work, *sum_dy_x = work + channels;
    std::fill_n(work, 2 * channels, 0.0);
    for (int64_t k = 0; k < g.chunks.count(); ++k, partials += this->partial_size) {
      this->each_fold([&](int64_t fold) {
        const double *dy = partials + fold, *dy_x = dy + this->padded;
        with_step(this->grid.channel_step, [=](auto step) INLINE_LAMBDA {
          for (int64_t c = 0; c < channels; ++c) {
            sum_dy[c] += dy[c * step];
            sum_dy_x[c] += dy_x[c * step];
          }
        });
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
            this->fetch(unroll, grad_output + start, i, g.row_stride);
            this->fetch(unroll, input + start, i, g.row_stride);
            const V mean = distbn::load(coefficients + i);
            const V scale = distbn::load(coefficients + padded + i);
            const V slope = distbn::load(coefficients + 2 * padded + i);
            const V offset = distbn::load(coefficients + 3 * padded + i);
            for (int r = 0; r < unroll; ++r) {
              const int64_t at = start + r * g.row_stride + i;
              const V dy = load(grad_output + at);
              store(grad_input + at, (load(input + at) - mean) * slope + (dy * scale + offset));
            }
          },
          this->streamed);
        },
        [] {});
  }
};

}  // namespace distbn

// Virtual-rank batch norm for the CPU, on torch's stable ABI: the operators that __init__.py calls,
// for inputs of one dtype, DISTBN_VALUE in C++ and DISTBN_DTYPE, a string, in their names.
// Outputs are allocated by the caller; see rows.h and columns.h for the two memory layouts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "columns.h"
#include "rows.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace distbn;
using T = DISTBN_VALUE;

Problem problem_of(const Tensor& input, int64_t ranks, bool interleaved) {
  STD_TORCH_CHECK(input.scalar_type() == c10::CppTypeToScalarType<T>::value,
                  "distbn_convert's CPU kernel for " DISTBN_DTYPE " was given another dtype");
  const auto sizes = input.sizes();
  int64_t positions = 1;
  for (size_t d = 2; d < sizes.size(); ++d) positions *= sizes[d];
  return {sizes[0], sizes[1], positions, ranks, interleaved};
}

// A new tensor above glibc's threshold is mapped afresh and faulted in page by page, which costs
// more than the arithmetic; huge pages take a third of that time.
void advise_huge_pages(const Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(output.data_ptr());
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage;
  const uintptr_t end = (start + output.numel() * output.element_size()) / kPage * kPage;
  if (end >= begin + 2 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Values values_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Long,
                  "distbn_convert's CPU kernel: a parameter or buffer is of a dtype that it lacks");
  const bool matrix = tensor.dim() == 2;
  return {tensor.data_ptr(), dtype, matrix ? tensor.stride(0) : 0,
          tensor.stride(matrix)};
}

Values values_of(const std::optional<Tensor>& tensor) {
  return tensor ? values_of(*tensor) : Values{};
}

// Each rank that has samples has seen one batch more.
void count_batch(const Tensor& counters, const Problem& problem) {
  int64_t* count = static_cast<int64_t*>(counters.data_ptr());
  for (int64_t v = 0; v < std::min(problem.ranks, problem.samples); ++v) ++count[v * counters.stride(0)];
}

void forward(Tensor output, Tensor mean, Tensor rstd, Tensor input, std::optional<Tensor> weight,
             std::optional<Tensor> bias, std::optional<Tensor> running_mean,
             std::optional<Tensor> running_var, std::optional<Tensor> counters, bool cumulative,
             double momentum, double eps, bool interleaved, bool channels_last) {
  const Problem problem = problem_of(input, mean.size(0), interleaved);
  if (counters) count_batch(*counters, problem);
  const ForwardStatistics statistics{
      values_of(mean),        values_of(rstd),     values_of(weight), values_of(bias),
      values_of(running_mean), values_of(running_var), cumulative ? values_of(counters) : Values{},
      momentum, eps};
  advise_huge_pages(output);
  const T* x = static_cast<const T*>(input.data_ptr());
  T* y = static_cast<T*>(output.data_ptr());
  if (takes_columns(problem, channels_last)) {
    Runner(ColumnsForward<T>(problem, channels_last, x, y, statistics)).run();
  } else {
    Runner(RowsForward<T>(problem, x, y, statistics)).run();
  }
}

// Adds the ranks' rows up, in order.
void sum_ranks(const double* rows, const Problem& p, const Tensor& sum) {
  const Values values = values_of(sum);
  std::vector<double> total(p.channels);
  for (int64_t v = 0; v < p.ranks; ++v) {
    for (int64_t c = 0; c < p.channels; ++c) total[c] += rows[v * p.channels + c];
  }
  values.store(0, 0, p.channels, total.data());
}

void backward(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_output,
              Tensor input, std::optional<Tensor> weight, Tensor mean, Tensor rstd,
              bool interleaved, bool channels_last) {
  const Problem problem = problem_of(input, mean.size(0), interleaved);
  // Kept between calls: where ranks have few samples, new memory costs more than the arithmetic.
  thread_local std::vector<double> rows;
  rows.resize(2 * problem.ranks * problem.channels);
  double *weight_rows = rows.data(), *bias_rows = weight_rows + problem.ranks * problem.channels;
  const BackwardStatistics statistics{values_of(mean), values_of(rstd), values_of(weight),
                                      weight_rows,     bias_rows,       problem.channels};
  advise_huge_pages(grad_input);
  const T* dy = static_cast<const T*>(grad_output.data_ptr());
  const T* x = static_cast<const T*>(input.data_ptr());
  T* dx = static_cast<T*>(grad_input.data_ptr());
  if (takes_columns(problem, channels_last)) {
    Runner(ColumnsBackward<T>(problem, channels_last, dy, x, dx, statistics)).run();
  } else {
    Runner(RowsBackward<T>(problem, dy, x, dx, statistics)).run();
  }
  sum_ranks(weight_rows, problem, grad_weight);
  sum_ranks(bias_rows, problem, grad_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(distbn_convert_cpu, library) {
  library.def(
      "forward_" DISTBN_DTYPE
      "(Tensor(a!) output, Tensor(b!) mean, Tensor(c!) rstd, Tensor input, Tensor? weight,"
      " Tensor? bias, Tensor(d!)? running_mean, Tensor(e!)? running_var,"
      " Tensor(f!)? counters, bool cumulative, float momentum, float eps, bool interleaved, bool channels_last) -> ()");
  library.def(
      "backward_" DISTBN_DTYPE
      "(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias,"
      " Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor rstd,"
      " bool interleaved, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(distbn_convert_cpu, CPU, library) {
  library.impl("forward_" DISTBN_DTYPE, TORCH_BOX(&forward));
  library.impl("backward_" DISTBN_DTYPE, TORCH_BOX(&backward));
}

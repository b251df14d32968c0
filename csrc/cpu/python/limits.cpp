// The machine's limits by the backend's own instructions: multiply-adds, reads of a buffer, and reads of a call's
// weights in the order of the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "call/region.h"
#include "dispatch.h"
#include "python/python_types.h"

namespace py = pybind11;

namespace qpilots::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds of each of the rounds that fit into `seconds`; one at least.
template <class Round>
std::vector<double> time_rounds(double seconds, Round round) {
  std::vector<double> times;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    round();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  return times;
}

// Best round of the same loop on every thread, in flop/s: of what the products are made of, or of multiply-adds on
// vectors.
double peak_flops_per_second(const std::string& precision, int threads, double seconds, bool vectors) {
  require(precision == "float32" || precision == "bfloat16", "precision: expected float32 or bfloat16");
  require(threads > 0, "threads: expected at least 1");
  const KernelTable& table = kernels("");
  const Format format = precision == "float32" ? Format::kF32 : Format::kBf16;
  const py::gil_scoped_release release;
  std::vector<double> flops(threads, 0.0);
  const std::vector<double> times = time_rounds(seconds, [&] {
    parallel_region(threads,
                    [&](int thread, int) { flops[thread] = (vectors ? table.fma_peak : table.peak)(format, 1000000); });
  });
  double total = 0;
  for (double f : flops) total += f;
  return total / *std::min_element(times.begin(), times.end());
}

// Best round of reads of a buffer of the given size, each thread its own part again and again, in bytes/s.
double read_bytes_per_second(std::size_t bytes, int threads, double seconds) {
  const KernelTable& table = kernels("");
  require(threads > 0, "threads: expected at least 1");
  const std::size_t part = bytes / threads / 4096 * 4096;
  require(part > 0, "bytes: at least one page a thread");
  const py::gil_scoped_release release;
  Buffer buffer;
  const char* data = buffer.reserve(bytes);
  const int repeats = static_cast<int>(std::max<std::size_t>(1, (std::size_t{64} << 20) / bytes));
  const std::vector<double> times = time_rounds(seconds, [&] {
    parallel_region(threads, [&](int thread, int team) {
      volatile float sink = 0;
      for (int t = thread; t < threads; t += team) {
        for (int i = 0; i < repeats; ++i) sink = table.read(data + part * t, part);
      }
      (void)sink;
    });
  });
  return static_cast<double>(part) * threads * repeats / *std::min_element(times.begin(), times.end());
}

constexpr std::size_t kGrain = 512, kBlockBytes = 32 * kGrain;  // what one loop of a read takes; less than a layer

// Forwards, or the same blocks backwards.
float read_blocks(const KernelTable& table, const char* data, std::size_t bytes, bool backwards) {
  const std::size_t blocks = (bytes + kBlockBytes - 1) / kBlockBytes;
  float sum = 0;
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::size_t at = (backwards ? blocks - 1 - i : i) * kBlockBytes;
    sum += table.read(data + at, std::min(kBlockBytes, bytes - at));
  }
  return sum;
}

// Best and median seconds that nothing but loads of a call's weights take. As in a call, every step reads the flow,
// shared by all threads, then each twice-visited network (critics, posterior) forwards and at once backwards, one after
// the other in the order opposite to the step's before; then the flow for as many visits as are left to a step.
std::pair<double, double> read_weights_seconds(std::size_t flow_bytes, const std::vector<std::size_t>& twice, int steps,
                                               int flow_visits, int threads, double seconds) {
  require(threads > 0 && steps > 0, "threads, steps: expected at least 1");
  const KernelTable& table = kernels("");
  const py::gil_scoped_release release;
  const auto whole = [](std::size_t bytes) { return (bytes + kGrain - 1) / kGrain * kGrain; };
  const std::size_t flow_part = whole(flow_bytes / threads);
  std::vector<std::size_t> parts;  // at least one a thread
  for (std::size_t bytes : twice) {
    const std::size_t split = (threads + twice.size() - 1) / twice.size();
    for (std::size_t i = 0; i < split; ++i) parts.push_back(whole(bytes / split));
  }
  std::vector<std::size_t> offsets;
  std::size_t total = flow_part * threads;
  for (std::size_t part : parts) {
    offsets.push_back(total);
    total += part;
  }
  require(total > 0, "bytes: expected some");
  Buffer buffer;
  const char* data = buffer.reserve(total);
  const int count = static_cast<int>(parts.size());
  std::vector<double> times = time_rounds(seconds, [&] {
    parallel_region(threads, [&](int thread, int team) {
      volatile float sink = 0;
      const auto flow = [&] {
        for (int t = thread; t < threads; t += team) {
          sink = read_blocks(table, data + flow_part * t, flow_part, false);
        }
      };
      for (int step = 0; step < steps; ++step) {
        const int visits = flow_visits * (step + 1) / steps - flow_visits * step / steps;
        if (visits > 0) flow();
        for (int i = thread; i < count; i += team) {
          const int j = step % 2 == 0 ? i : count - 1 - i;
          sink = read_blocks(table, data + offsets[j], parts[j], false);
          sink = read_blocks(table, data + offsets[j], parts[j], true);
        }
        for (int v = 1; v < visits; ++v) flow();
      }
      (void)sink;
    });
  });
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2]};
}

}  // namespace

void bind_limits(py::module_& module) {
  module.def("cpu_peak_flops", &peak_flops_per_second, py::arg("precision"), py::arg("threads"),
             py::arg("seconds") = 0.1, py::arg("vectors") = false);
  module.def("cpu_read_bandwidth", &read_bytes_per_second, py::arg("bytes"), py::arg("threads"),
             py::arg("seconds") = 0.1);
  module.def("cpu_read_weights", &read_weights_seconds, py::arg("flow_bytes"), py::arg("twice"), py::arg("steps"),
             py::arg("flow_visits"), py::arg("threads"), py::arg("seconds") = 0.1);
}

}  // namespace qpilots::cpu

// What the primitives cost that the kernels are made of: exchanges between blocks, launches in a graph, reads from L2.
// One JSON object a line: {"price": name, "value": number, "unit": unit}. About five seconds.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "platform.h"

using namespace qpilots::cuda;

namespace {

constexpr int kRounds = 2000;
constexpr int kWords = 256;  // a row of 512 bf16

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

// ---- exchanges; `group` blocks in a row take part in each

struct CounterArgs {
  std::uint32_t* counters;  // one a group, 128 bytes apart
  float* dirty;             // [grid][threads], a store that the release has to wait for
  int group;
};

__global__ void counter_hops(CounterArgs a) {
  std::uint32_t* mine = a.counters + 32 * (blockIdx.x / a.group);
  std::uint32_t goal = 0;
  for (int i = 0; i < kRounds; ++i) {
    store_global(a.dirty + blockIdx.x * blockDim.x + threadIdx.x, static_cast<float>(i));
    __syncthreads();
    goal += a.group;
    if (threadIdx.x == 0) {
      add_release(mine, 1);
      while (static_cast<std::int32_t>(load_acquire(mine) - goal) < 0) {
      }
    }
    __syncthreads();
  }
}

struct WordArgs {
  std::uint64_t* slots;  // [groups][2][kWords]
  int group;
};

// Every block writes its share of the words of a round, and waits for all of them.
__global__ void word_hops(WordArgs a) {
  const int group = blockIdx.x / a.group, rank = blockIdx.x % a.group;
  const int share = (kWords + a.group - 1) / a.group, first = rank * share;
  std::uint64_t sum = 0;
  for (std::uint64_t i = 1; i <= kRounds; ++i) {
    std::uint64_t* slot = a.slots + (static_cast<std::size_t>(group) * 2 + (i & 1)) * kWords;
    const int mine = first + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < share && mine < kWords) store_word(slot + mine, (i << 32) | (sum & 1));
    std::uint64_t word;
    do {
      word = load_word(slot + threadIdx.x);
    } while (word >> 32 != i);
    sum += word & 1;
    __syncthreads();
  }
  if (sum == ~std::uint64_t{0}) store_word(a.slots, sum);
}

struct ClusterArgs {
  float* dirty;  // null: nothing is stored before a barrier
};

__global__ void cluster_hops(ClusterArgs a) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < kRounds; ++i) {
    if (a.dirty != nullptr) store_global(a.dirty + blockIdx.x * blockDim.x + threadIdx.x, static_cast<float>(i));
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

__global__ void nothing(int) {}

// ---- L2: every block reads `vectors` 16-byte vectors from `stride` vectors further on than the block before it

struct ReadArgs {
  const unsigned char* bytes;
  std::size_t vectors, stride;
  int rounds;
  std::uint32_t* sink;
};

__global__ void read_l2(ReadArgs a) {
  std::uint32_t sum = 0;
  for (int i = 0; i < a.rounds; ++i) {
    const uint4* first = reinterpret_cast<const uint4*>(a.bytes) + blockIdx.x * a.stride;
#pragma unroll 8
    for (std::size_t w = threadIdx.x; w < a.vectors; w += blockDim.x) {
      const uint4 v = __ldcg(first + w);
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 77) *a.sink = sum;
}

template <class Args>
void launch(void (*kernel)(Args), int grid, int threads, int cluster, bool cooperative, Args args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

// Median microseconds of `run` on the default stream.
double median_us(const std::function<void()>& run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  run();
  CHECK(cudaDeviceSynchronize());
  std::vector<float> milliseconds;
  for (int i = 0; i < 7; ++i) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float elapsed;
    CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    milliseconds.push_back(elapsed);
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  return milliseconds[3] * 1e3;
}

void report(const char* price, double value, const char* unit) {
  std::printf("{\"price\": \"%s\", \"value\": %.4g, \"unit\": \"%s\"}\n", price, value, unit);
  std::fflush(stdout);
}

double graph_node_us(int nodes) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < nodes; ++i) nothing<<<1, 32, 0, stream>>>(i);
  cudaGraph_t graph;
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  return median_us([&] { CHECK(cudaGraphLaunch(executable, nullptr)); }) / nodes;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int sms = device.multiProcessorCount;
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  std::uint32_t *counters, *sink;
  std::uint64_t* slots;
  float* dirty;
  unsigned char* bytes;
  CHECK(cudaMalloc(&counters, std::size_t{1} << 20));
  CHECK(cudaMalloc(&slots, std::size_t{4} << 20));
  CHECK(cudaMalloc(&dirty, std::size_t{1} << 20));
  CHECK(cudaMalloc(&sink, 4));
  CHECK(cudaMalloc(&bytes, kBytes));
  CHECK(cudaMemset(bytes, 1, kBytes));
  char name[96];
  for (const int group : {sms, 13, 8}) {
    const int grid = sms / group * group;
    std::snprintf(name, sizeof name, "counter and fence among %d blocks", group);
    report(name, median_us([&] {
                   CHECK(cudaMemsetAsync(counters, 0, std::size_t{1} << 20));
                   launch(counter_hops, grid, kThreads, 0, true, CounterArgs{counters, dirty, group});
                 }) / kRounds,
           "us");
    std::snprintf(name, sizeof name, "tagged words among %d blocks", group);
    report(name, median_us([&] {
                   CHECK(cudaMemsetAsync(slots, 0, std::size_t{4} << 20));
                   launch(word_hops, grid, kWords, 0, true, WordArgs{slots, group});
                 }) / kRounds,
           "us");
  }
  report("a kernel in a graph", graph_node_us(200), "us");
  if (device.major >= 9) {
    for (float* store : {static_cast<float*>(nullptr), dirty}) {
      report(store == nullptr ? "cluster barrier of 8" : "cluster barrier of 8, a store before it",
             median_us([&] { launch(cluster_hops, 88, kThreads, 8, false, ClusterArgs{store}); }) / kRounds, "us");
    }
  }
  const auto rate = [&](const char* what, int grid, std::size_t vectors, std::size_t stride, double total) {
    constexpr int kReads = 20;
    const double us =
        median_us([&] { launch(read_l2, grid, 512, 0, false, ReadArgs{bytes, vectors, stride, kReads, sink}); });
    report(what, total * kReads / us * 1e-6, "TB/s");
  };
  const std::size_t all = (std::size_t{18} << 20) / 16, member = 1640448 / 16;
  rate("L2, 18 MB once by all blocks", sms, all / sms, all / sms, static_cast<double>(all / sms * sms * 16));
  rate("L2, the same 1.64 MB by every block", sms, member, 0, static_cast<double>(member * 16) * sms);
  rate("L2, 1.64 MB each by 10 blocks", 10, member, member, static_cast<double>(member * 16) * 10);
  return 0;
}

// One network's forward and vector-Jacobian product on its own, for the operators.
#include <cstring>
#include <utility>

#include "call/region.h"
#include "call/sampler.h"

namespace qpilots::cpu {
namespace {

class NetworkRun {
 public:
  NetworkRun(const Network& net, const LayerSource* sources, LiveArena& live, const float* const (&blocks)[kInputKinds],
             const float* film, int batch, int threads)
      : net_(net),
        sources_(sources),
        live_(live),
        blocks_(blocks),
        film_(film),
        batch_(batch),
        threads_(threads),
        members_(net.shape().members),
        rows_together_(net.fk().rows_together),
        ranges_(range_count(batch, rows_together_, net.shape().members, threads)) {}

  // cotangent null: forward into `out`; else the pullback into `out` [B, input_dim].
  void run(const float* cotangent, int input_dim, float* out, WorkspacePool& pool) {
    std::unique_ptr<Workspace> workspace = pool.acquire();
    auto lease = std::make_unique<ArenaLease>(net_, sources_, live_, workspace->arenas[0]);
    arena_ = lease->data();
    carve(nullptr, cotangent != nullptr ? input_dim : 0);
    carve(workspace->scratch.reserve(carved_), cotangent != nullptr ? input_dim : 0);
    new (all_) Barrier();
    parallel_region(threads_, [&](int thread, int threads) {
      for (int u = thread; u < lease->units(); u += threads) lease->refresh(u);
      all_->wait(threads);
      for (int i = thread; i < members_ * ranges_; i += threads) visit(i, thread, cotangent, input_dim, out);
      if (cotangent == nullptr) return;
      all_->wait(threads);
      const long elements = static_cast<long>(batch_) * input_dim;
      for (long e = elements * thread / threads; e < elements * (thread + 1) / threads; ++e) {
        float sum = partial_[e];
        for (int j = 1; j < members_; ++j) sum += partial_[j * elements + e];
        out[e] = sum;
      }
    });
    lease->refreshed();
    lease.reset();
    pool.release(std::move(workspace));
  }

 private:
  void carve(char* memory, int input_dim) {
    Carver c(memory);
    all_ = c.take<Barrier>(1);
    partial_ = c.take<float>(static_cast<std::size_t>(members_) * batch_ * input_dim);
    scratch_bytes_ = PassScratch::bytes(rows_together_, net_.max_padded(), net_.keeps());
    scratch_ = c.take<char>(scratch_bytes_ * threads_);
    saves_bytes_ = Carver::rounded(net_.saves_bytes(rows_together_));
    saves_ = c.take<char>(saves_bytes_ * threads_);
    rows_floats_ = static_cast<std::size_t>(rows_together_) * net_.max_padded();
    rows_ = c.take<float>(2 * rows_floats_ * threads_);
    carved_ = c.used();
  }

  void visit(int item, int thread, const float* cotangent, int input_dim, float* out) {
    const int j = item / ranges_;
    const RowRange range = row_range(batch_, ranges_, item % ranges_);
    const int begin = range.begin, rows = range.count();
    const char* member = arena_ + net_.member_bytes() * j;
    const FormatKernels& fk = net_.fk();
    const Team alone{0, 1, nullptr};
    PassScratch scratch =
        PassScratch::carve(scratch_ + scratch_bytes_ * thread, rows_together_, net_.max_padded(), net_.keeps());
    const std::ptrdiff_t film_dim = net_.film_dim();
    const Pass pass{net_,    member, alone, scratch, rows, film_ == nullptr ? nullptr : film_ + begin * film_dim,
                    film_dim};
    float* base = rows_ + 2 * rows_floats_ * thread;
    float* wide = base + rows_floats_;
    const std::ptrdiff_t first = net_.first_padded(), out_padded = net_.out_padded();
    const float* bias = reinterpret_cast<const float*>(member + net_.layer(0).bias);
    for (int r = 0; r < rows; ++r) {
      std::memcpy(base + r * first, bias, sizeof(float) * first);
      scratch.init[r] = base + r * first;
    }
    for (int kind = 0; kind < kInputKinds; ++kind) {
      const InputKind input = static_cast<InputKind>(kind);
      if (!net_.has(input)) continue;
      const Block& block = net_.input(input);
      const FormatKernels& kernels = net_.table().formats[static_cast<int>(block.format)];
      const int width = padded(block.in);
      for (int r = 0; r < rows; ++r) {  // padded copies of the caller's rows
        std::memset(wide + r * width, 0, sizeof(float) * width);
        std::memcpy(wide + r * width, blocks_[kind] + static_cast<std::size_t>(begin + r) * block.in,
                    sizeof(float) * block.in);
      }
      if (input == kX) continue;
      const std::ptrdiff_t pitch = scratch.pitch * kernels.a_bytes;
      kernels.to_operand({rows, width, wide, width, nullptr, nullptr, scratch.operand[0], pitch});
      kernels.forward({&block, member + block.offset, 0, block.panels, scratch.operand[0], pitch, rows, scratch.init,
                       nullptr, base, first});
    }
    const int width = padded(net_.input(kX).in);
    for (int r = 0; r < rows; ++r) {
      std::memset(wide + r * width, 0, sizeof(float) * width);
      std::memcpy(wide + r * width, blocks_[kX] + static_cast<std::size_t>(begin + r) * net_.input(kX).in,
                  sizeof(float) * net_.input(kX).in);
    }
    fk.to_operand({rows, width, wide, width, nullptr, nullptr, scratch.operand[0], scratch.pitch * fk.a_bytes});
    const std::size_t row = static_cast<std::size_t>(j) * batch_ + begin;
    const int out_width = net_.shape().widths.back();
    const Saves saves{cotangent != nullptr ? saves_ + saves_bytes_ * thread : nullptr, rows, 0};
    if (cotangent == nullptr) {
      if (net_.head()) {
        forward_pass(pass, kX, nullptr, saves, out + row, 1);
        return;
      }
      forward_pass(pass, kX, nullptr, saves, wide, out_padded);
      for (int r = 0; r < rows; ++r) {
        std::memcpy(out + (row + r) * out_width, wide + r * out_padded, sizeof(float) * out_width);
      }
      return;
    }
    forward_pass(pass, kX, nullptr, saves, wide, out_padded);
    if (!net_.head()) {
      for (int r = 0; r < rows; ++r) {
        std::memset(wide + r * out_padded, 0, sizeof(float) * out_padded);
        std::memcpy(wide + r * out_padded, cotangent + (row + r) * out_width, sizeof(float) * out_width);
      }
    }
    const int which = backward_pass(pass, net_.head() ? cotangent + row : wide, out_padded, saves, true);
    const float* delta = reinterpret_cast<const float*>(scratch.d_operand[which]);
    for (int kind = 0; kind < kInputKinds; ++kind) {
      const InputKind input = static_cast<InputKind>(kind);
      if (!net_.has(input)) continue;
      const Block& block = net_.input(input);
      const FormatKernels& kernels = net_.table().formats[static_cast<int>(block.format)];
      kernels.to_operand({rows, static_cast<int>(first), delta, scratch.pitch, nullptr, nullptr,
                          scratch.d_operand[1 - which], scratch.d_pitch()});
      input_vjp(pass, block, kernels, 1 - which, wide, block.in_padded);
      for (int r = 0; r < rows; ++r) {
        std::memcpy(partial_ + (row + r) * input_dim + block.column, wide + r * block.in_padded,
                    sizeof(float) * block.in);
      }
    }
  }

  const Network& net_;
  const LayerSource* sources_;
  LiveArena& live_;
  const float* const (&blocks_)[kInputKinds];
  const float* film_;
  const int batch_, threads_, members_, rows_together_, ranges_;
  char *arena_ = nullptr, *scratch_ = nullptr, *saves_ = nullptr;
  Barrier* all_ = nullptr;
  float *partial_ = nullptr, *rows_ = nullptr;
  std::size_t scratch_bytes_ = 0, saves_bytes_ = 0, rows_floats_ = 0, carved_ = 0;
};

}  // namespace

void network_forward(const Network& net, const LayerSource* sources, LiveArena& live,
                     const float* const (&blocks)[kInputKinds], const float* film, int batch, int threads, float* out,
                     WorkspacePool& pool) {
  NetworkRun(net, sources, live, blocks, film, batch, usable_threads(threads)).run(nullptr, 0, out, pool);
}

void network_vjp(const Network& net, const LayerSource* sources, LiveArena& live,
                 const float* const (&blocks)[kInputKinds], const float* film, const float* cotangent, int batch,
                 int threads, int input_dim, float* dx, WorkspacePool& pool) {
  NetworkRun(net, sources, live, blocks, film, batch, usable_threads(threads)).run(cotangent, input_dim, dx, pool);
}

}  // namespace qpilots::cpu

#include "call/sampler.h"

#include <pthread.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <new>
#include <utility>

#include "call/crowd.h"
#include "call/sample_run.h"
#include "qpilots/number.h"

namespace qpilots::cpu {

SampleRun::SampleRun(const SamplerPlan& plan, const SampleArgs& args, int threads)
    : plan_(plan),
      args_(args),
      table_(plan.flow->table()),
      steering_(plan.steering),
      batch_(args.batch),
      draws_(plan.draws() ? plan.steering.num_samples : 1),
      draw_rows_(args.batch * draws_),
      pitch_(padded(plan.action_dim)),
      threads_(threads),
      rows_together_(plan.flow->fk().rows_together) {
  for (int k = 0; k < plan.steps(); ++k) any_steered_ = any_steered_ || plan.schedule[k].weight > 0.0f;
  keep_flow_ = any_steered_ && steering_.estimate == Estimate::kTweedie && steering_.full_jacobian;
  flow_ranges_ = range_count(batch_, rows_together_, 1, threads_);
  critic_ranges_ = any_steered_ ? range_count(draw_rows_, rows_together_, plan.critic->shape().members, threads_) : 0;
  if (steering_.q_scale_kind == QScale::kNumber) q_divisor_ = steering_.q_scale;
}

std::size_t SampleRun::carve(char* base) {
  Carver c(base);
  const Network& flow = *plan_.flow;
  const std::size_t B = batch_, D = draw_rows_, P = pitch_;
  barriers_ = c.take<Barrier>(threads_);
  all_ = c.take<Barrier>(1);
  queues_ = c.take<std::atomic<int>>(plan_.steps() + 2);
  x_ = c.take<float>(B * P);
  v_ = c.take<float>(B * P);
  flow_base_ = c.take<float>(B * flow.first_padded());
  flow_time_ = c.take<float>((plan_.steps() + plan_.glass.size()) * flow.first_padded());
  int width = flow.max_padded();
  if (any_steered_) {
    const Network& critic = *plan_.critic;
    const std::size_t E = critic.shape().members;
    width = std::max(width, critic.max_padded());
    a_ = c.take<float>(D * P);
    g_ = c.take<float>(D * P);
    jg_ = c.take<float>(D * P);
    if (!plan_.action_columns.empty()) mapped_ = c.take<float>(D * P);
    critic_base_ = c.take<float>(E * B * critic.first_padded());
    q_ = c.take<float>(E * D);
    dq_ = c.take<float>(E * D * P);
    value_ = c.take<float>(D);
    std_ = c.take<float>(D);
    p_ = c.take<float>(D);
    critic_saves_bytes_ = Carver::rounded(critic.saves_bytes(rows_together_) + sizeof(float) * rows_together_ * kPad);
    thread_saves_ = c.take<char>(critic_saves_bytes_ * threads_);
    thread_weights_ = c.take<float>(E * threads_);
    if (keep_flow_) flow_saves_ = c.take<char>(flow.saves_bytes(batch_));
    if (plan_.draws()) vhat_ = c.take<float>(D * P);
    if (steering_.estimate == Estimate::kMfm) {
      const Network& posterior = *plan_.posterior;
      width = std::max(width, posterior.max_padded());
      posterior_base_ = c.take<float>(B * posterior.first_padded());
      posterior_time_ = c.take<float>(static_cast<std::size_t>(plan_.steps()) * posterior.first_padded());
      posterior_x_ = c.take<float>(B * posterior.first_padded());
      delta_sum_ = c.take<float>(B * posterior.first_padded());
      posterior_saves_ = c.take<char>(posterior.saves_bytes(draw_rows_));
    } else if (steering_.estimate == Estimate::kGlass) {
      gx_ = c.take<float>(D * P);
      total_ = c.take<float>(B * P);
      flow_saves_ = c.take<char>(flow.saves_bytes(draw_rows_) * steering_.glass_steps);
    }
  }
  scratch_width_ = width;
  for (int n = 0; n < 3; ++n) keeps_ = keeps_ || (plan_.network(n) != nullptr && plan_.network(n)->keeps());
  scratch_bytes_ = PassScratch::bytes(rows_together_, width, keeps_);
  scratch_ = c.take<char>(scratch_bytes_ * threads_);
  return c.used();
}

void SampleRun::set_arenas(const std::unique_ptr<ArenaLease> (&live)[3]) {
  for (int i = 0; i < 3; ++i) {
    live_[i] = live[i].get();
    arenas_[i] = args_.packed != nullptr ? args_.packed->arenas[i].data()
                 : live_[i] != nullptr   ? live_[i]->data()
                                         : nullptr;
  }
  for (int i = 0; i < threads_; ++i) new (&barriers_[i]) Barrier();
  new (all_) Barrier();
  for (int i = 0; i < plan_.steps() + 2; ++i) new (&queues_[i]) std::atomic<int>(0);
}

void SampleRun::finish(RowRange rows, const Team& team) {
  for (int r = rows.begin + team.begin(rows.count()); r < rows.begin + team.end(rows.count()); ++r) {
    float* out = args_.actions + static_cast<std::size_t>(r) * plan_.action_dim;
    for (int c = 0; c < plan_.action_dim; ++c) out[c] = qpilots::clamp(row(x_, r)[c], plan_.low[c], plan_.high[c]);
  }
}

// ---------------------------------------------------------------- the loop

template <class Visit>
void SampleRun::for_flow_rows(int thread, int threads, Visit visit) {
  for_fixed_items(flow_ranges_, thread, threads, barriers_, [&](int item, const Team& team, int leader) {
    PassScratch scratch =
        PassScratch::carve(scratch_ + scratch_bytes_ * leader, rows_together_, scratch_width_, keeps_);
    float* weights = thread_weights_ == nullptr ? nullptr : thread_weights_ + thread * plan_.critic->shape().members;
    visit(flow_rows(item), Worker{team, scratch, nullptr, weights});
  });
}

void SampleRun::run(int thread, int threads) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();
  const auto lap = [&](PhaseIndex phase) {
    if (args_.phase_seconds == nullptr || thread != 0) return;
    const Clock::time_point now = Clock::now();
    args_.phase_seconds[phase] += std::chrono::duration<double>(now - last).count();
    last = now;
  };
  if (args_.packed == nullptr) {
    int units = 0;
    for (int n = 0; n < 3; ++n) units += live_[n] == nullptr ? 0 : live_[n]->units();
    for (int i; (i = queues_[0].fetch_add(1, std::memory_order_relaxed)) < units;) {
      int n = 0;
      for (; live_[n] == nullptr || i >= live_[n]->units(); ++n) {
        if (live_[n] != nullptr) i -= live_[n]->units();
      }
      live_[n]->refresh(i);
    }
    all_->wait(threads);
    lap(kPack);
  }
  {
    PassScratch scratch =
        PassScratch::carve(scratch_ + scratch_bytes_ * thread, rows_together_, scratch_width_, keeps_);
    const Team alone{0, 1, nullptr};
    const int members = any_steered_ ? plan_.critic->shape().members : 0;
    const int items = 1 + flow_ranges_ * (1 + members);
    for (int i; (i = queues_[1].fetch_add(1, std::memory_order_relaxed)) < items;) {
      prepare_item(i, Worker{alone, scratch, nullptr, nullptr});
    }
    all_->wait(threads);
    lap(kPrepare);
  }
  for (int k = 0; k < plan_.steps(); ++k) {
    for_flow_rows(thread, threads, [&](RowRange rows, const Worker& w) { denoise(k, rows, w); });
    lap(kDenoise);
    if (!(plan_.schedule[k].weight > 0.0f)) continue;
    all_->wait(threads);
    const int items = plan_.critic->shape().members * critic_ranges_;
    for_queued_items(items, thread, threads, queues_[2 + k], barriers_, [&](int i, const Team& team, int leader) {
      PassScratch scratch =
          PassScratch::carve(scratch_ + scratch_bytes_ * leader, rows_together_, scratch_width_, keeps_);
      // alternate directions: the members visited last are the ones still in cache
      const int item = k % 2 == 0 ? i : items - 1 - i;
      criticise(item, Worker{team, scratch, thread_saves_ + critic_saves_bytes_ * leader, nullptr});
    });
    all_->wait(threads);
    lap(kGradient);
    for_flow_rows(thread, threads, [&](RowRange rows, const Worker& w) { combine(rows, w); });
    if (steering_.q_scale_kind == QScale::kBatchStd) {
      all_->wait(threads);
      if (thread == 0) set_batch_scale();
      all_->wait(threads);
    }
    for_flow_rows(thread, threads, [&](RowRange rows, const Worker& w) { update(k, rows, w); });
    lap(kUpdate);
  }
  for_flow_rows(thread, threads, [&](RowRange rows, const Worker& w) { finish(rows, w.team); });
}

namespace {
[[maybe_unused]] std::atomic<bool> forked{false};
}

int usable_threads(int threads) {
#if defined(_OPENMP)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
  return forked.load(std::memory_order_relaxed) || omp_in_parallel() ? 1 : std::max(1, threads);
#else
  (void)threads;
  return 1;
#endif
}

std::size_t workspace_bytes(const SamplerPlan& plan, int batch, int threads) {
  SampleArgs args;
  args.batch = batch;
  return SampleRun(plan, args, std::max(1, threads)).carve(nullptr);
}

namespace {

Crowd crowd;

double seconds_of(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

void sample(const SamplerPlan& plan, const SampleArgs& args, WorkspacePool& pool) {
  const int wanted = usable_threads(args.threads), threads = crowd.threads(wanted);
  std::unique_ptr<Workspace> workspace = pool.acquire();
  SampleRun run(plan, args, threads);
  run.carve(workspace->scratch.reserve(run.carve(nullptr)));
  std::unique_ptr<ArenaLease> live[3];
  for (int n = 0; n < 3 && args.packed == nullptr; ++n) {
    if (args.sources[n] != nullptr) {
      live[n] = std::make_unique<ArenaLease>(*plan.network(n), args.sources[n], *args.live[n], workspace->arenas[n]);
    }
  }
  run.set_arenas(live);
  if (wanted == 1) {
    parallel_region(threads, [&](int thread, int count) { run.run(thread, count); });
  } else {
    const double start = seconds_of(CLOCK_MONOTONIC);
    std::atomic<double> most_lost{0.0};
    parallel_region(threads, [&](int thread, int count) {
      const double ran_before = seconds_of(CLOCK_THREAD_CPUTIME_ID);
      run.run(thread, count);
      const double ran = seconds_of(CLOCK_THREAD_CPUTIME_ID) - ran_before;
      const double lost = seconds_of(CLOCK_MONOTONIC) - start - ran;
      double most = most_lost.load();
      while (lost > most && !most_lost.compare_exchange_weak(most, lost)) {
      }
    });
    crowd.note(threads, {seconds_of(CLOCK_MONOTONIC) - start, most_lost.load()});
  }
  for (auto& lease : live) {
    if (lease != nullptr) lease->refreshed();
    lease.reset();
  }
  pool.release(std::move(workspace));
}

void pack(const SamplerPlan& plan, const LayerSource* const (&sources)[3], int threads, PackedWeights& out) {
  for (int n = 0; n < 3; ++n) {
    if (sources[n] != nullptr) out.arenas[n].reserve(plan.network(n)->arena_bytes());
  }
  parallel_region(usable_threads(threads), [&](int thread, int count) {
    for (int n = 0; n < 3; ++n) {
      if (sources[n] == nullptr) continue;
      for (int u = thread; u < plan.network(n)->pack_units(); u += count)
        plan.network(n)->pack(u, sources[n], out.arenas[n].data());
    }
  });
}

}  // namespace qpilots::cpu

#include "live/arena.h"

namespace qpilots::cpu {

ArenaLease::ArenaLease(const Network& net, const LayerSource* sources, LiveArena& own, LiveArena& spare)
    : net_(net), sources_(sources), lock_(own.mutex, std::try_to_lock), arena_(lock_.owns_lock() ? &own : &spare) {
  arena_->arena.reserve(net.arena_bytes());
  if (arena_ == &spare) arena_->fingerprints.clear();  // whatever it holds may be another network's
  arena_->fingerprints.resize(net.pack_units(), 0);
  panels_unchanged_ = arena_->watch.unchanged();
}

void ArenaLease::refresh(int unit) {
  if (panels_unchanged_ && net_.panel_unit(unit)) return;
  if (net_.refresh(unit, sources_, arena_->arena.data(), arena_->fingerprints.data())) {
    changed_.store(true, std::memory_order_relaxed);
  }
}

void ArenaLease::refreshed() {
  if (!panels_unchanged_) arena_->watch.was_read(changed_.load(std::memory_order_relaxed));
}

}  // namespace qpilots::cpu

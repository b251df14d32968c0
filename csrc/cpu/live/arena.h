// A network's live weights, packed: kept from call to call, and brought up to date by each.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "call/network.h"
#include "live/buffer.h"
#include "live/write_watch.h"

namespace qpilots::cpu {

// A network's live weights as packed by the last call that used them.
struct LiveArena {
  Buffer arena;
  std::vector<std::uint64_t> fingerprints;  // one a pack unit; 0: never packed
  WriteWatch watch;                         // of the memory behind the fingerprints
  std::mutex mutex;                         // held by the call that uses it
};

// A live arena for the length of a call: the network's own, or where another call is using that, a spare one to be
// packed from scratch.
class ArenaLease {
 public:
  ArenaLease(const Network& net, const LayerSource* sources, LiveArena& own, LiveArena& spare);
  char* data() const { return arena_->arena.data(); }
  int units() const { return net_.pack_units(); }
  // Brings one of the units up to date, from any thread.
  void refresh(int unit);
  // After all of them. A lease that ends without it, by an exception, leaves its arena to be read again.
  void refreshed();

 private:
  const Network& net_;
  const LayerSource* sources_;
  std::unique_lock<std::mutex> lock_;
  LiveArena* arena_;
  bool panels_unchanged_ = false;
  std::atomic<bool> changed_{false};
};

}  // namespace qpilots::cpu

#include "live/write_watch.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>

#if defined(__linux__)
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tuning.h"

namespace qpilots::cpu {
#if defined(__linux__)

namespace {

// Sorted, with overlaps joined: the gaps may belong to someone who writes there all the time.
std::vector<Interval> joined(std::vector<Interval> memory) {
  std::sort(memory.begin(), memory.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<Interval> result;
  for (const Interval& next : memory) {
    if (!result.empty() && next.begin <= result.back().end) {
      result.back().end = std::max(result.back().end, next.end);
    } else {
      result.push_back(next);
    }
  }
  return result;
}

// From linux/fs.h and linux/userfaultfd.h of Linux 6.7: newer than the headers that wheels are built against.
struct PageRegion {
  std::uint64_t begin, end, categories;
};
struct ScanArgs {
  std::uint64_t size, flags, begin, end, walk_end, regions, regions_length, max_pages, inverted, mask, any_mask,
      returned;
};
constexpr std::uint64_t kWritten = 1u << 1;
constexpr std::uint64_t kProtectMatching = 1u << 0, kRequireProtectable = 1u << 1;
constexpr std::uint64_t kUnpopulated = 1u << 13, kAsynchronous = 1u << 15;
constexpr int kUserModeOnly = 1;
const unsigned long kScan = _IOWR('f', 16, ScanArgs);

}  // namespace

struct WriteWatch::Kernel {
  std::mutex mutex;
  int pid = 0, faults = -1, pages = -1;
  long generation = 0;  // of `faults`: a forked child opens its own
  std::string refusal;
  std::vector<std::weak_ptr<Watched>> watched;

  static Kernel& instance() {
    static Kernel* kernel = new Kernel();  // never destroyed: threads may outlive static destructors
    return *kernel;
  }

  bool open() {
    const int now = static_cast<int>(getpid());
    if (pid == now) return refusal.empty();
    if (faults >= 0) close(faults);  // a parent's, whose memory they speak of
    if (pages >= 0) close(pages);
    pid = now;
    ++generation;
    watched.clear();
    refusal.clear();
    const auto refuse = [&](const char* what) {
      refusal = std::string(what) + ": " + std::strerror(errno);
      return false;
    };
    faults = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly));
    if (faults < 0) return refuse("userfaultfd");
    uffdio_api api = {};
    api.api = UFFD_API;
    api.features = kUnpopulated | kAsynchronous;
    if (ioctl(faults, UFFDIO_API, &api) != 0) return refuse("asynchronous write protection needs Linux 6.7");
    pages = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pages < 0) return refuse("/proc/self/pagemap");
    return true;
  }

  // Whether every page is protected and unwritten.
  bool clean(const std::vector<Interval>& memory) const {
    for (const Interval& part : memory) {
      PageRegion found;
      ScanArgs args = scan_args(part, kRequireProtectable);
      args.regions = reinterpret_cast<std::uintptr_t>(&found);
      args.regions_length = 1;
      if (ioctl(pages, kScan, &args) != 0 || args.walk_end != part.end) return false;
    }
    return true;
  }

  // Protects the pages. Returns why not, or nothing.
  std::string protect(const Watched& own) {
    const std::string shared = not_private(own.pages);
    if (!shared.empty()) return shared;
    for (const Interval& part : own.pages) {
      uffdio_register request = {};
      request.range = {part.begin, part.end - part.begin};
      request.mode = UFFDIO_REGISTER_MODE_WP;
      if (ioctl(faults, UFFDIO_REGISTER, &request) != 0) return std::string("UFFDIO_REGISTER: ") + std::strerror(errno);
    }
    if (clean(own.pages)) return {};
    // Others who watch one of these pages would no longer see that it was written.
    for (const auto& entry : watched) {
      const std::shared_ptr<Watched> other = entry.lock();
      if (other != nullptr && other.get() != &own && overlap(other->pages, own.pages)) other->state.store(kReading);
    }
    for (const Interval& part : own.pages) {
      ScanArgs args = scan_args(part, kRequireProtectable | kProtectMatching);
      if (ioctl(pages, kScan, &args) < 0) return std::string("PAGEMAP_SCAN: ") + std::strerror(errno);
    }
    return clean(own.pages) ? std::string() : "pages that cannot be protected";
  }

  void remember(const std::shared_ptr<Watched>& own) {
    watched.erase(std::remove_if(watched.begin(), watched.end(), [&](const auto& w) { return w.expired(); }),
                  watched.end());
    for (const auto& entry : watched) {
      if (entry.lock() == own) return;
    }
    watched.push_back(own);
  }

  static ScanArgs scan_args(const Interval& part, std::uint64_t flags) {
    ScanArgs args = {};
    args.size = sizeof args;
    args.flags = flags;
    args.begin = part.begin;
    args.end = part.end;
    args.mask = args.returned = kWritten;
    return args;
  }

  static bool overlap(const std::vector<Interval>& a, const std::vector<Interval>& b) {
    for (const Interval& x : a) {
      for (const Interval& y : b) {
        if (x.begin < y.end && y.begin < x.end) return true;
      }
    }
    return false;
  }

  // Another process can write to shared memory, and a file's owner to its pages, through page tables of their own.
  static std::string not_private(const std::vector<Interval>& memory) {
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    if (maps == nullptr) return std::string("/proc/self/maps: ") + std::strerror(errno);
    std::size_t at = 0;
    std::uintptr_t covered = memory.front().begin;
    char line[512];
    bool line_start = true;
    while (at < memory.size() && std::fgets(line, sizeof line, maps) != nullptr) {
      const bool parse = line_start;
      line_start = std::strchr(line, '\n') != nullptr;
      unsigned long begin, end, inode;
      char permissions[5];
      if (!parse || std::sscanf(line, "%lx-%lx %4s %*x %*s %lu", &begin, &end, permissions, &inode) != 4) continue;
      while (at < memory.size() && begin <= covered && covered < end) {
        if (permissions[3] != 'p' || inode != 0) {
          std::fclose(maps);
          return "memory shared with another process or a file";
        }
        if (memory[at].end > end) {
          covered = end;
          break;
        }
        if (++at < memory.size()) covered = memory[at].begin;
      }
    }
    std::fclose(maps);
    return at == memory.size() ? std::string() : "memory that is not mapped";
  }
};

WriteWatch::WriteWatch(std::vector<Interval> memory) {
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  watched_ = std::make_shared<Watched>();
  std::uintptr_t total = 0;
  for (const Interval& part : joined(std::move(memory))) {
    const Interval whole = {(part.begin + page - 1) / page * page, part.end / page * page};
    if (whole.begin >= whole.end) {
      edges_.push_back(part);
      continue;
    }
    watched_->pages.push_back(whole);
    total += whole.end - whole.begin;
    if (part.begin < whole.begin) edges_.push_back({part.begin, whole.begin});
    if (whole.end < part.end) edges_.push_back({whole.end, part.end});
  }
  if (total < tuning::Live::kLeastWatched) refusal_ = "less than 1 MB";
}

bool WriteWatch::unchanged() {
  if (watched_ == nullptr || !refusal_.empty()) return false;
  Kernel& kernel = Kernel::instance();
  // never waits: whoever forks while another thread holds this leaves it locked in the child
  const std::unique_lock<std::mutex> lock(kernel.mutex, std::try_to_lock);
  if (!lock.owns_lock() || !kernel.open()) return false;
  if (watched_->state == kArmed) {
    if (watched_->generation == kernel.generation && kernel.clean(watched_->pages) && edges_unchanged()) {
      ++saved_;
      return true;
    }
    patience_ =
        saved_ > 16 * patience_ ? tuning::Live::kFirstPatience : std::min(2 * patience_, tuning::Live::kMostPatience);
    quiet_ = 0;
  }
  watched_->state = kReading;
  if (quiet_ < patience_) return false;
  kernel.remember(watched_);
  refusal_ = kernel.protect(*watched_);  // before the caller reads: what is written from here on is seen
  if (!refusal_.empty()) return false;
  copy_edges();
  saved_ = 0;
  watched_->generation = kernel.generation;
  watched_->state = kArming;
  return false;
}

void WriteWatch::was_read(bool changed) {
  if (watched_ == nullptr) return;
  quiet_ = changed ? 0 : std::min(quiet_ + 1, tuning::Live::kMostPatience);
  int arming = kArming;  // unless another reader protected the same pages since
  watched_->state.compare_exchange_strong(arming, kArmed);
}

bool WriteWatch::edges_unchanged() const {
  const char* copy = edge_copy_.data();
  for (const Interval& edge : edges_) {
    const std::size_t bytes = edge.end - edge.begin;
    if (std::memcmp(copy, reinterpret_cast<const void*>(edge.begin), bytes) != 0) return false;
    copy += bytes;
  }
  return true;
}

void WriteWatch::copy_edges() {
  edge_copy_.clear();
  for (const Interval& edge : edges_) {
    edge_copy_.insert(edge_copy_.end(), reinterpret_cast<const char*>(edge.begin),
                      reinterpret_cast<const char*>(edge.end));
  }
}

std::string WriteWatch::unavailable_reason() {
  Kernel& kernel = Kernel::instance();
  const std::unique_lock<std::mutex> lock(kernel.mutex, std::try_to_lock);
  return !lock.owns_lock() || kernel.open() ? std::string() : kernel.refusal;  // locked: another thread watches
}

#else

WriteWatch::WriteWatch(std::vector<Interval>) { refusal_ = unavailable_reason(); }
bool WriteWatch::unchanged() { return false; }
void WriteWatch::was_read(bool) {}
std::string WriteWatch::unavailable_reason() { return "needs Linux"; }

#endif

std::string WriteWatch::status() const {
  if (watched_ == nullptr || !refusal_.empty()) return refusal_.empty() ? "not asked for" : refusal_;
  return watched_->state == kArmed ? "watching" : "reading";
}

}  // namespace qpilots::cpu

// The few values asked for last, by number, and the very last one of a thread's own. What is kept
// changes speed, never results.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace megaswitch {

// How often this process was forked off another.
inline unsigned forks_so_far() {
  static std::atomic<unsigned> count{0};
  static const int registered =
      ::pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return count.load(std::memory_order_relaxed);
}

template <typename Value>
class Recent {
 public:
  // The value of `key`, made by `make(key)` unless it is at hand. Safe to call from many threads,
  // and in a forked child, where the lock may be in the hands of a thread that did not come along.
  template <typename Make>
  std::shared_ptr<const Value> get(uint64_t key, Make make) {
    if (forks_so_far() != forks_) return std::make_shared<const Value>(make(key));
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Slot& slot : slots_) {
      if (slot.value != nullptr && slot.key == key) return slot.value;
    }
    Slot& oldest = slots_[next_++ % slots_.size()];
    oldest = {key, std::make_shared<const Value>(make(key))};
    return oldest.value;
  }

  // Neighbouring samples mostly want the same value: asking for it again takes no lock, and touches
  // no memory that other threads write to.
  class Last {
   public:
    template <typename Make>
    const Value& get(Recent& recent, uint64_t key, Make make) {
      if (value_ == nullptr || key_ != key) {
        value_ = recent.get(key, make);
        key_ = key;
      }
      return *value_;
    }

   private:
    uint64_t key_ = 0;
    std::shared_ptr<const Value> value_;
  };

 private:
  struct Slot {
    uint64_t key = 0;
    std::shared_ptr<const Value> value;
  };

  const unsigned forks_ = forks_so_far();
  std::mutex mutex_;
  std::array<Slot, 16> slots_;
  std::size_t next_ = 0;
};

}  // namespace megaswitch

// Fills batches ahead of their use, in threads of its own. What a batch holds does not depend on
// them: they only decide when it is ready.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>

#include "sampler.h"

namespace megaswitch {

class Loader {
 public:
  // Starts `threads`, which make at most `capacity` batches ahead. Throws DataError where the
  // system gives no more threads.
  Loader(std::shared_ptr<const Sampler> sampler, unsigned threads, unsigned capacity);
  // Waits for the batches that threads are filling just now; those still queued are dropped.
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // Queue a batch. The buffers must stay until it was delivered or the loader is gone.
  // Throws std::logic_error if `capacity` batches wait already.
  void submit(const int64_t* sample_indices, uint64_t count, const BatchBuffers& out);

  // Wait for the oldest batch, at most for `patience`. True: it has left the queue, and `error` is
  // what its thread threw, if it did. Throws std::logic_error if none was submitted.
  bool next(std::chrono::milliseconds patience, std::exception_ptr& error);

 private:
  struct Shared;

  // Throws DataError in a forked child: threads do not survive a fork.
  void check_process() const;
  void stop();

  std::unique_ptr<Shared> shared_;
};

}  // namespace megaswitch

#include "loader.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "indexed.h"

namespace megaswitch {

namespace {

struct Job {
  std::vector<int64_t> indices;
  BatchBuffers out;
  bool done = false;
  std::exception_ptr error;
};

using Jobs = std::deque<std::shared_ptr<Job>>;

std::shared_ptr<Job> take(Jobs& jobs) {
  auto job = std::move(jobs.front());
  jobs.pop_front();
  return job;
}

// Signals are for the threads that know what to do with them; faults of a thread stay its own.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) {
      sigdelset(&blocked, fault);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

struct Loader::Shared {
  std::shared_ptr<const Sampler> sampler;
  unsigned capacity;
  pid_t process;

  std::mutex mutex;
  std::condition_variable work;   // there is a batch to announce or to fill, or it is time to stop
  std::condition_variable ready;  // a batch is filled
  bool stopping = false;
  Jobs announced;  // bytes still to be asked for
  Jobs queued;     // still to be filled
  Jobs ordered;    // still to be delivered
  std::vector<std::thread> threads;

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      work.wait(lock, [this] { return stopping || !queued.empty(); });
      if (stopping) return;
      // All batches are announced before any is filled, so that storage works on many at once.
      const bool announce = !announced.empty();
      const std::shared_ptr<Job> job = take(announce ? announced : queued);
      lock.unlock();
      std::exception_ptr error;
      try {
        const uint64_t count = job->indices.size();
        if (announce) {
          sampler->prefetch(job->indices.data(), count);
        } else {
          sampler->fill(job->indices.data(), count, job->out);
        }
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (!job->error) job->error = error;
      if (!announce) {
        job->done = true;
        ready.notify_all();
      }
    }
  }
};

Loader::Loader(std::shared_ptr<const Sampler> sampler, unsigned threads, unsigned capacity)
    : shared_(std::make_unique<Shared>()) {
  if (threads < 1 || capacity < 1) throw std::invalid_argument("a loader needs a thread and room");
  shared_->sampler = std::move(sampler);
  shared_->capacity = capacity;
  shared_->process = ::getpid();
  const BlockedSignals blocked;
  Shared* const shared = shared_.get();
  try {
    for (unsigned i = 0; i < threads; ++i) {
      shared->threads.emplace_back([shared] { shared->run(); });
    }
  } catch (const std::system_error& error) {
    stop();
    throw DataError("cannot start " + std::to_string(threads) + " loader threads: " +
                    error.what() + ". Lower data.loader_threads or raise the limit of processes.");
  }
}

Loader::~Loader() {
  if (::getpid() == shared_->process) {
    stop();
  } else {
    // In a forked child there is nothing to join, and what the threads were waiting for can
    // neither be locked nor destroyed.
    static_cast<void>(shared_.release());
  }
}

void Loader::stop() {
  {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->work.notify_all();
  for (std::thread& thread : shared_->threads) thread.join();
}

void Loader::check_process() const {
  if (::getpid() != shared_->process) {
    throw DataError("this loader belongs to process " + std::to_string(shared_->process) +
                    ", and its threads did not come along when that was forked. Open the data in "
                    "the process that trains, or start it by spawn.");
  }
}

void Loader::submit(const int64_t* sample_indices, uint64_t count, const BatchBuffers& out) {
  check_process();
  auto job = std::make_shared<Job>();
  job->indices.assign(sample_indices, sample_indices + count);
  job->out = out;
  {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    if (shared_->ordered.size() >= shared_->capacity) throw std::logic_error("the loader is full");
    shared_->announced.push_back(job);
    shared_->queued.push_back(job);
    shared_->ordered.push_back(std::move(job));
  }
  shared_->work.notify_one();
}

bool Loader::next(std::chrono::milliseconds patience, std::exception_ptr& error) {
  check_process();
  std::unique_lock<std::mutex> lock(shared_->mutex);
  if (shared_->ordered.empty()) throw std::logic_error("no batch was submitted");
  const std::shared_ptr<Job> job = shared_->ordered.front();
  if (!shared_->ready.wait_for(lock, patience, [&] { return job->done; })) return false;
  shared_->ordered.pop_front();
  error = job->error;
  return true;
}

}  // namespace megaswitch

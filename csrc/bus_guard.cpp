#include "bus_guard.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>

namespace megaswitch {

namespace {

// A copy that is under way in a thread.
struct Copy {
  uintptr_t begin;  // of the first page
  uintptr_t end;
  sigjmp_buf back;
};

// Where a thread stands. Its storage is there from the thread's start (initial-exec): a library's
// usual kind may be allocated at its first use, which a signal handler must not do.
struct Thread {
  Copy* copy;
  bool unblocked;
  bool passing_on;
};
#ifdef __ELF__
__attribute__((tls_model("initial-exec")))
#endif
thread_local Thread self{nullptr, false, false};

// Who had the signal before. Never freed: a handler may be reading it.
std::atomic<const struct sigaction*> previous_action{nullptr};

bool is_function(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 ||
         (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction& previous = *previous_action.load();
  const bool sent = info->si_code <= 0;  // by kill() or raise(), not by a fault
  // A handler set after ours may know ours as the one before, and come back to it.
  if (!is_function(previous) || self.passing_on) {
    if (sent && !self.passing_on && previous.sa_handler == SIG_IGN) return;
    struct sigaction standard {};
    standard.sa_handler = SIG_DFL;
    ::sigaction(signal, &standard, nullptr);
    if (sent) ::raise(signal);
    return;  // a fault happens again, and ends the process
  }
  self.passing_on = true;
  sigset_t blocked = previous.sa_mask;
  if ((previous.sa_flags & SA_NODEFER) == 0) sigaddset(&blocked, signal);
  sigset_t before;
  ::pthread_sigmask(SIG_BLOCK, &blocked, &before);
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else {
    previous.sa_handler(signal);
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  self.passing_on = false;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  Copy* const copy = self.copy;
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  if (copy != nullptr && info->si_code > 0 && at >= copy->begin && at < copy->end) {
    siglongjmp(copy->back, 1);  // over memcpy alone, which owns nothing
  }
  pass_on(signal, info, context);
}

// A fault whose signal is blocked ends the process, and pools often block all signals.
void unblock() {
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  ::pthread_sigmask(SIG_UNBLOCK, &bus, nullptr);
  self.unblocked = true;
}

}  // namespace

bool copy_mapped(void* to, const void* from, uint64_t bytes) {
  static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  if (!self.unblocked) unblock();
  Copy copy;
  const auto begin = reinterpret_cast<uintptr_t>(from);
  copy.begin = begin - begin % page;
  copy.end = begin + bytes;
  // Masks need no saving: our handler blocks nothing.
  const bool survived = sigsetjmp(copy.back, 0) == 0;
  if (survived) {
    self.copy = &copy;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(to, from, bytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  self.copy = nullptr;
  return survived;
}

void claim_bus_errors() {
  struct sigaction now {};
  ::sigaction(SIGBUS, nullptr, &now);
  const auto is_ours = [](const struct sigaction& action) {
    return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_bus_error;
  };
  if (is_ours(now)) return;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ::sigaction(SIGBUS, nullptr, &now);
  if (is_ours(now)) return;
  // Known before it is needed: the signal may come right after.
  previous_action.store(new struct sigaction(now));
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error;
  // NODEFER: the signal must not stay blocked behind siglongjmp.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  ::sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace megaswitch

// Threads that leave signals to the others.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>
#include <utility>

namespace attamba {

/// Starts a thread that blocks every signal, so that handlers keep running on the program's own threads. Throws
/// std::system_error when there can be no thread.
template <class Body>
std::thread start_signal_free_thread(Body body) {
  sigset_t all, previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);  // the new thread inherits it
  try {
    std::thread thread(std::move(body));
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    return thread;
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    throw;
  }
}

}  // namespace attamba

// What both servers do with their arguments and threads.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

inline int64_t positive(const std::string& name, const char* text) {
  char* end;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end || value <= 0)
    throw std::invalid_argument(name + ": expected a positive integer, but got '" + text + "'");
  return value;
}

// Runs work(i) in threads i = 0 .. count - 1; the seconds until the last has ended. What one of
// them throws is thrown then.
template <class Work>
double in_threads(int64_t count, const Work& work) {
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> thrown(count);
  for (int64_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i]() {
      try {
        work(i);
      } catch (...) {
        thrown[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : thrown) {
    if (error) std::rethrow_exception(error);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

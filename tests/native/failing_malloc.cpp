// malloc that fails when it is told to, for LD_PRELOAD: see test_faults.py. Only calls that come
// from our libraries or through them count: torch's binding ends the process where its own fail.
#include <dlfcn.h>
#include <execinfo.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static thread_local int64_t left = 0;

// The n-th allocation of this thread from here on fails; of 0 none. What is left of the last n.
int64_t fail_allocation(int64_t n) {
  void* frame;
  backtrace(&frame, 1);  // its first call allocates
  const int64_t before = left;
  left = n;
  return before;
}

static bool is_ours() {
  void* frames[200];
  const int64_t now = left;
  left = 0;  // what this allocates itself does not fail
  const int count = backtrace(frames, 200);
  bool found = false;
  for (int i = 0; i < count && !found; ++i) {
    Dl_info info;
    found = dladdr(frames[i], &info) && std::strstr(info.dli_fname, "/rmsnorm_cuda/lib/");
  }
  left = now;
  return found;
}

static bool fails() {
  if (left == 0 || !is_ours() || --left > 0) return false;
  errno = ENOMEM;
  return true;
}

void* malloc(size_t size) { return fails() ? nullptr : __libc_malloc(size); }
void* calloc(size_t n, size_t size) { return fails() ? nullptr : __libc_calloc(n, size); }
void* realloc(void* p, size_t size) { return fails() ? nullptr : __libc_realloc(p, size); }
void* memalign(size_t by, size_t size) { return fails() ? nullptr : __libc_memalign(by, size); }
void* aligned_alloc(size_t by, size_t size) { return memalign(by, size); }
int posix_memalign(void** p, size_t by, size_t size) {
  void* const block = memalign(by, size);
  if (block) *p = block;
  return block ? 0 : ENOMEM;
}
}

// Runs a grid on the CPU. Each thread of a block is a fiber, which runs until it has to wait: at a barrier, for the lanes of its warp, asleep, or at
// its end. Then goes on whichever thread that can run comes first in the block's order; CUDA promises none, so that every order must give the same
// bits. One thread, with its warp, so runs as far ahead of the others as barriers allow, and what a missing barrier would have ordered is met in the
// wrong order in one order of the threads or its reverse.
//
// Schedules: 0 runs blocks and their threads in ascending order, one block after the other; -1 in descending order; any other number is the seed of a
// random order, drawn anew at each barrier, with some blocks side by side that take turns between two threads of a block. Blocks of a cooperative
// launch are all side by side in every schedule. A copy that runs beside its thread is made at once in schedule 0, in -1 not before it is waited
// for, and at random either way in the others.
//
// Errors end the launch: threads that wait for what never happens, an index beyond an array's bounds, an address that belongs to nobody, a data race
// where the sources are compiled so that races.h can find it.

// Its longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "cuda_pipeline.h"
#include "cuda_runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fenced.h"
#include "races.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
// Blocks side by side in a random order.
constexpr size_t kResident = 3;
// Dynamic shared memory that a block has without asking, and at most: the least of the architectures in setup.py, 8.6.
constexpr size_t kDynamicBytes = 48 * 1024, kMaxDynamicBytes = 99 * 1024;
constexpr size_t kStackBytes = 64 * 1024;

int64_t schedule = 0;
// Few, so that each has much to do.
int multiprocessors = 3;
std::string error_text;
std::map<const void*, size_t> allowed_bytes;
std::vector<std::string> launched;

// ----------------------------------------------------------------------------------------------------------------------------------- fibers

// Where the scheduler goes on when a fiber waits.
jmp_buf scheduler;

struct Fiber {
  Fenced stack{kStackBytes};
  bool started = false;
  ucontext_t start;
  jmp_buf context;
};

// _setjmp and _longjmp switch without a system call; a context is needed only to begin on another stack.
[[noreturn]] void go_on(Fiber& fiber) {
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
  abort();
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler) == 0) go_on(fiber);
}

void pause(Fiber& fiber) {
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

// ------------------------------------------------------------------------------------------------------------------------- threads and blocks

enum class Status { kReady, kAtBarrier, kAtWarp, kAsleep, kEnded };

// A copy into shared memory that is not made yet, and how many groups had ended before it was ordered.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

struct Thread {
  uint3 index;
  Status status = Status::kEnded;
  Place place;
  Fiber* fiber;
  // What it exchanges with its warp.
  unsigned mask, from;
  char given[8], taken[8];
  std::vector<Copy> copies;
  size_t groups;
  History history;
};

// Fibers that have ended their work and wait for more.
std::vector<std::unique_ptr<Fiber>> idle_fibers;

// A block that runs; one after the other of the grid's has its place.
struct Block {
  Block(size_t num_threads, size_t num_dynamic, size_t num_static)
      : threads(num_threads),
        order(num_threads),
        rank(num_threads),
        dynamic_bytes(round_up(num_dynamic, 16)),
        dynamic(dynamic_bytes),
        statics(num_static) {
    while (idle_fibers.size() < num_threads) idle_fibers.push_back(std::make_unique<Fiber>());
    fibers.assign(std::make_move_iterator(idle_fibers.end() - num_threads), std::make_move_iterator(idle_fibers.end()));
    idle_fibers.resize(idle_fibers.size() - num_threads);
  }
  // A fiber that did not end, in a launch that failed, goes with its block.
  ~Block() {
    for (size_t t = 0; t < threads.size(); ++t)
      if (threads[t].status == Status::kEnded) idle_fibers.push_back(std::move(fibers[t]));
  }
  void make_ready(size_t thread) {
    threads[thread].status = Status::kReady;
    ready[rank[thread] / 64] |= uint64_t(1) << rank[thread] % 64;
  }
  uint64_t number;
  uint3 index;
  std::vector<Thread> threads;
  // order[rank] is a thread; a set bit of `ready` is the rank of one that can run.
  std::vector<size_t> order, rank;
  uint64_t ready[kMaxThreads / 64];
  // How many threads have come to the next barrier, and after how many of them another block has its turn.
  size_t at_barrier, stop_after;
  // The lanes of each warp that wait for others.
  unsigned at_warp[kMaxThreads / kWarp];
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t dynamic_bytes;
  Fenced dynamic;
  // Its __shared__ variables while another block runs.
  std::vector<char> statics;
  SharedMemory shared;
};

struct Launch {
  const std::function<void()>* run_thread;
  std::mt19937_64 random;
  // Whose turn it is.
  uint64_t block = 0;
};

Launch* launch_ = nullptr;
Block* block_ = nullptr;
Thread* thread_ = nullptr;

// Thrown on the scheduler's stack; a fiber that finds an error leaves its text here and never goes on.
std::string failure;

}  // namespace

void fail_in_thread(const std::string& text) {
  failure = "thread " + std::to_string(thread_ - block_->threads.data()) + " " + text;
  _longjmp(scheduler, 1);
}

namespace {

void thread_main() {
  for (;;) {
    (*launch_->run_thread)();
    thread_->status = Status::kEnded;
    pause(*thread_->fiber);
  }
}

std::string text_of(const Place& place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(place.what) + " (" + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) + ")";
}

bool same(const Place& a, const Place& b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

// The library's thread-local storage on this thread of the CPU: all __shared__ variables.
struct Statics {
  char* begin = nullptr;
  size_t size = 0;
};

thread_local char in_statics;

Statics find_statics() {
  // Touched, so that it is there.
  *const_cast<volatile char*>(&in_statics) = 0;
  Statics found;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        const char* const here = &in_statics;
        const char* const begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          if (part.p_type != PT_TLS || begin == nullptr || here < begin || here >= begin + part.p_memsz) continue;
          *static_cast<Statics*>(result) = {const_cast<char*>(begin), part.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  if (found.size == 0) throw std::runtime_error("CUDA on the host: the shared memory is not found");
  return found;
}

// --------------------------------------------------------------------------------------------------------------------------------- schedule

// The numbers from 0 on, in the schedule's order.
void arrange(std::vector<size_t>& numbers) {
  std::iota(numbers.begin(), numbers.end(), size_t(0));
  if (schedule < 0) std::reverse(numbers.begin(), numbers.end());
  if (schedule > 0) std::shuffle(numbers.begin(), numbers.end(), launch_->random);
}

void set_order(Block& block) {
  arrange(block.order);
  for (size_t rank = 0; rank < block.order.size(); ++rank) block.rank[block.order[rank]] = rank;
  block.at_barrier = 0;
  // In a random order, at every fourth barrier, where some threads have come to it and others have not.
  block.stop_after = schedule > 0 ? launch_->random() % (4 * block.order.size()) : block.order.size();
}

// Take the next thread that can run, nullptr when none can.
Thread* take_ready(Block& block) {
  for (size_t word = 0; word < std::size(block.ready); ++word) {
    if (block.ready[word] == 0) continue;
    const size_t rank = 64 * word + __builtin_ctzll(block.ready[word]);
    block.ready[word] &= block.ready[word] - 1;
    return &block.threads[block.order[rank]];
  }
  return nullptr;
}

void start(Block& block, uint64_t number, const Statics& statics) {
  block.number = number;
  block.index = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y), unsigned(number / gridDim.x / gridDim.y)};
  memset(block.ready, 0, sizeof block.ready);
  memset(block.at_warp, 0, sizeof block.at_warp);
  // NaN in every dtype.
  memset(block.dynamic.begin(), 0xFF, block.dynamic.room());
  std::fill(block.statics.begin(), block.statics.end(), char(0xFF));
  set_order(block);
  block.shared = {{statics.begin, statics.size}, {block.dynamic.begin(), block.dynamic.room()}, {}};
  for (size_t t = 0; t < block.threads.size(); ++t) {
    Thread& thread = block.threads[t];
    thread.index = {unsigned(t % blockDim.x), unsigned(t / blockDim.x % blockDim.y), unsigned(t / blockDim.x / blockDim.y)};
    thread.place = {"nothing", "", 0};
    thread.copies.clear();
    thread.groups = 0;
    thread.fiber = block.fibers[t].get();
    if (finds_races) thread.history = begin(uint32_t(number), t, block.threads.size(), {thread.fiber->stack.begin(), kStackBytes}, block.shared);
    if (!thread.fiber->started) {
      ucontext_t& context = thread.fiber->start;
      getcontext(&context);
      context.uc_stack.ss_sp = thread.fiber->stack.begin();
      // Stacks that began at the same place of a page would all lie in the same few lines of the cache.
      context.uc_stack.ss_size = kStackBytes - t % 32 * 128;
      context.uc_link = nullptr;
      makecontext(&context, thread_main, 0);
    }
    block.make_ready(t);
  }
}

std::string describe(const Block& block) {
  std::string text;
  for (size_t first = 0, last; first < block.threads.size(); first = last + 1) {
    const Thread& thread = block.threads[first];
    const auto alike = [&](const Thread& other) {
      return other.status == thread.status && (thread.status == Status::kEnded || same(other.place, thread.place));
    };
    last = first;
    while (last + 1 < block.threads.size() && alike(block.threads[last + 1])) ++last;
    if (first > 0) text += "; ";
    text += first == last ? "thread " + std::to_string(first) : "threads " + std::to_string(first) + "-" + std::to_string(last);
    text += thread.status == Status::kEnded ? " ended" : " in " + text_of(thread.place);
  }
  return text;
}

enum class Turn { kEnded, kMoved, kStuck };

// Run the block's threads until all have ended, none but sleepers can go on, or others are to have their turn.
Turn run(Block& block) {
  blockIdx = block.index;
  for (size_t t = 0; t < block.threads.size(); ++t)
    if (block.threads[t].status == Status::kAsleep) block.make_ready(t);
  bool moved = false;
  for (;;) {
    while (Thread* thread = take_ready(block)) {
      thread_ = thread;
      threadIdx = thread->index;
      if (finds_races) history_ = &thread->history;
      resume(*thread->fiber);
      thread_ = nullptr;
      history_ = nullptr;
      if (!failure.empty()) throw std::runtime_error(failure);
      moved |= thread->status != Status::kAsleep;
      if (thread->status == Status::kAtBarrier && block.at_barrier++ == block.stop_after) return Turn::kMoved;
    }
    const auto are = [&](Status status) { return [=](const Thread& thread) { return thread.status == status; }; };
    if (std::all_of(block.threads.begin(), block.threads.end(), are(Status::kEnded))) return Turn::kEnded;
    if (std::any_of(block.threads.begin(), block.threads.end(), are(Status::kAsleep))) return moved ? Turn::kMoved : Turn::kStuck;
    // Those who have ended do not come any more, and two barriers are not one.
    const auto at_the_first = [&](const Thread& thread) { return thread.status == Status::kAtBarrier && same(thread.place, block.threads[0].place); };
    if (!std::all_of(block.threads.begin(), block.threads.end(), at_the_first)) throw std::runtime_error("never meet: " + describe(block));
    set_order(block);
    for (size_t t = 0; t < block.threads.size(); ++t) block.make_ready(t);
    std::vector<History*> all;
    for (Thread& thread : block.threads)
      if (finds_races) all.push_back(&thread.history);
    meet(all);
  }
}

void run_grid(size_t num_threads, size_t dynamic_bytes, bool together) {
  const uint64_t num_blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const Statics statics = find_statics();
  std::vector<size_t> numbers(num_blocks);
  arrange(numbers);

  std::vector<std::unique_ptr<Block>> running, idle;
  for (size_t i = 0; i < (together ? num_blocks : std::min<uint64_t>(schedule > 0 ? kResident : 1, num_blocks)); ++i)
    idle.push_back(std::make_unique<Block>(num_threads, dynamic_bytes, statics.size));
  // The block whose __shared__ variables are in their place.
  Block* present = nullptr;
  size_t turn = 0, stuck = 0;
  for (uint64_t next = 0; next < num_blocks || !running.empty();) {
    for (; next < num_blocks && !idle.empty(); ++next) {
      start(*idle.back(), numbers[next], statics);
      running.push_back(std::move(idle.back()));
      idle.pop_back();
    }
    // One after the other while all are stuck, so that each gets its turn.
    turn = schedule > 0 && stuck == 0 ? launch_->random() % running.size() : (turn + 1) % running.size();
    Block& block = *running[turn];
    block_ = &block;
    launch_->block = block.number;
    if (present != &block) {
      if (present != nullptr) memcpy(present->statics.data(), statics.begin, statics.size);
      memcpy(statics.begin, block.statics.data(), statics.size);
      present = &block;
    }
    const Turn result = run(block);
    stuck = result == Turn::kStuck ? stuck + 1 : 0;
    if (stuck > running.size()) throw std::runtime_error("waits for what no running block does: " + describe(block));
    if (result != Turn::kEnded) continue;
    present = nullptr;
    idle.push_back(std::move(running[turn]));
    running.erase(running.begin() + std::ptrdiff_t(turn));
  }
}

// ------------------------------------------------------------------------------------------------------------------------------------ errors

struct sigaction usual_handler;

// Where the address belongs to nobody: a kernel's mistake ends its launch, anybody else's happens again and goes the usual way.
void on_fault(int, siginfo_t* info, void*) {
  if (thread_ == nullptr) {
    sigaction(SIGSEGV, &usual_handler, nullptr);
    return;
  }
  char address[32];
  snprintf(address, sizeof address, "%p", info->si_addr);
  fail_in_thread("accesses memory that is nobody's, at " + std::string(address));
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction ours{};
    ours.sa_sigaction = on_fault;
    // The jump out of the handler leaves the signal as it is.
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &ours, &usual_handler);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &usual_handler, nullptr); }
};

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel";
  int status = 0;
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : info.dli_sname;
  free(text);
  // Without the result's type before the name and the parameters' after it.
  if (const size_t space = name.find("void "); space == 0) name.erase(0, 5);
  return name.substr(0, name.find('('));
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------------------- intrinsics

unsigned lane() { return unsigned(thread_ - block_->threads.data()) % kWarp; }

void* dynamic_memory() { return block_->dynamic.last(block_->dynamic_bytes); }

void wait_for_block(Place place) {
  thread_->status = Status::kAtBarrier;
  thread_->place = place;
  pause(*thread_->fiber);
}

void let_others_run(Place place) {
  thread_->status = Status::kAsleep;
  thread_->place = place;
  pause(*thread_->fiber);
}

void wait_for_warp(unsigned mask, char (&bytes)[8], unsigned from, bool is_barrier, Place place) {
  Thread& self = *thread_;
  const size_t first = size_t(&self - block_->threads.data()) / kWarp * kWarp, count = std::min<size_t>(kWarp, block_->threads.size() - first);
  // A last warp may have fewer lanes.
  if (count < kWarp) mask &= (1u << count) - 1;
  if (!(mask >> lane() & 1)) fail_in_thread("is not in the mask of its own " + text_of(place));
  self.status = Status::kAtWarp;
  self.place = place;
  self.mask = mask;
  self.from = from;
  memcpy(self.given, bytes, sizeof bytes);
  const auto each_lane = [&](auto&& body) {
    for (size_t i = 0; i < count; ++i)
      if (mask >> i & 1) body(block_->threads[first + i], i);
  };
  unsigned& waiting = block_->at_warp[first / kWarp];
  waiting |= 1u << lane();
  bool complete = (waiting & mask) == mask;
  if (complete) each_lane([&](Thread& other, size_t) { complete &= other.mask == mask && same(other.place, place); });
  if (complete) {
    waiting &= ~mask;
    each_lane([&](Thread& other, size_t i) {
      // What a lane outside of the mask gives is undefined.
      if (mask >> other.from & 1)
        memcpy(other.taken, block_->threads[first + other.from].given, sizeof other.taken);
      else
        memset(other.taken, 0xFF, sizeof other.taken);
      block_->make_ready(first + i);
    });
    std::vector<History*> all;
    if (finds_races && is_barrier) each_lane([&](Thread& other, size_t) { all.push_back(&other.history); });
    meet(all);
  }
  pause(*self.fiber);
  memcpy(bytes, self.taken, sizeof bytes);
}

void copy_later(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0)
    fail_in_thread("copies " + std::to_string(bytes) + " bytes between addresses that are no multiples of that");
  if (finds_races) copy_beside(to, from, bytes, thread_->groups + 1, __builtin_return_address(0));
  if (schedule == 0 || (schedule > 0 && launch_->random() % 2 == 0))
    memcpy(to, from, bytes);
  else
    thread_->copies.push_back({to, from, bytes, thread_->groups});
}

void end_group() { ++thread_->groups; }

void wait_for_groups(size_t all_but) {
  if (finds_races && thread_->groups > all_but) wait_for_copies(thread_->groups - all_but);
  std::vector<Copy>& copies = thread_->copies;
  const auto due = [&](const Copy& copy) { return copy.group + all_but < thread_->groups; };
  for (const Copy& copy : copies)
    if (due(copy)) memcpy(copy.to, copy.from, copy.bytes);
  copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

// ------------------------------------------------------------------------------------------------------------------------------------- launch

const std::string& last_error() { return error_text; }

cudaError_t allow_dynamic_memory(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMaxDynamicBytes) {
    error_text = name_of(kernel) + " asks for " + std::to_string(bytes) + " bytes of shared memory; there are " + std::to_string(kMaxDynamicBytes);
    return cudaErrorInvalidValue;
  }
  allowed_bytes[kernel] = size_t(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& run_thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const std::string name = name_of(kernel);
  const auto found = allowed_bytes.find(kernel);
  const size_t allowed = found == allowed_bytes.end() ? kDynamicBytes : std::max(found->second, kDynamicBytes);
  const uint64_t num_threads = uint64_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const uint64_t num_blocks = uint64_t(config.gridDim.x) * config.gridDim.y * config.gridDim.z;
  const bool together = config.numAttrs > 0 && config.attrs[0].val.cooperative != 0;
  if (num_threads == 0 || num_threads > kMaxThreads || num_blocks == 0 || config.dynamicSmemBytes > allowed ||
      (together && num_blocks > uint64_t(multiprocessors))) {
    error_text = name + " cannot be launched with " + std::to_string(num_blocks) + " blocks of " + std::to_string(num_threads) + " threads and " +
                 std::to_string(config.dynamicSmemBytes) + " bytes of dynamic shared memory, of which " + std::to_string(allowed) + " are allowed";
    return cudaErrorInvalidValue;
  }
  launched.push_back(name);
  Launch launch{&run_thread, std::mt19937_64(uint64_t(schedule))};
  launch_ = &launch;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const FaultHandler handler;
  cudaError_t result = cudaSuccess;
  failure.clear();
  try {
    run_grid(num_threads, config.dynamicSmemBytes, together);
  } catch (const std::runtime_error& error) {
    error_text = name + ", block " + std::to_string(launch.block) + ": " + error.what();
    result = cudaErrorLaunchFailure;
  }
  thread_ = nullptr;
  block_ = nullptr;
  launch_ = nullptr;
  end_launch();
  return result;
}

// What a kernel or its launcher does wrong in this line of the sources.
void fail_at(const char* file, uint32_t line, const std::string& mistake) {
  const std::string text = mistake + ", " + text_of(Place{"at", file, int(line)});
  if (thread_ == nullptr) throw std::out_of_range("the launcher " + text);
  fail_in_thread(text);
}

}  // namespace cuda_on_host

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_host::multiprocessors : int(cuda_on_host::kMaxDynamicBytes);
  return cudaSuccess;
}

// ----------------------------------------------------------------------------------------------------------------------- what others call

extern "C" {

// Nothing to guard: the fibers are on the CPU.
int32_t cuda_on_host_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

void cuda_on_host_set_schedule(int64_t schedule) { cuda_on_host::schedule = schedule; }

// Returns how many there were before.
int cuda_on_host_set_multiprocessors(int count) { return std::exchange(cuda_on_host::multiprocessors, count); }

// Names of the kernels that have been launched since the last call, a line each.
const char* cuda_on_host_launched() {
  static std::string text;
  text.clear();
  for (const std::string& name : cuda_on_host::launched) text += name + "\n";
  cuda_on_host::launched.clear();
  return text.c_str();
}

// g++ -fsanitize calls these two: where an index lies beyond an array whose size the type says, and where an address is no multiple of what the
// type asks for, which no GPU takes.
struct Access {
  const char* file;
  uint32_t line, column;
};

struct Aligned {
  Access access;
  const void* type;
  uint8_t log_alignment, kind;
};

void __ubsan_handle_out_of_bounds(const Access* access, uintptr_t index) {
  cuda_on_host::fail_at(access->file, access->line, "takes element " + std::to_string(intptr_t(index)) + " of an array that has fewer");
}

void __ubsan_handle_type_mismatch_v1(const Aligned* wanted, uintptr_t) {
  const std::string multiple = std::to_string(1u << wanted->log_alignment);
  cuda_on_host::fail_at(wanted->access.file, wanted->access.line, "accesses an address that is no multiple of " + multiple);
}
}

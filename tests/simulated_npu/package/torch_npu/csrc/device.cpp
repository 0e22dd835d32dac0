// The device itself: memory, current device, streams, events, random state. Everything lives in host memory and runs
// at once, so streams and events have nothing to wait for.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <vector>

namespace simulated_npu {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceType kNpu = DeviceType::PrivateUse1;
constexpr size_t kMemoryBytes = size_t{64} << 30;
constexpr int kMostDevices = 64;

thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kMostDevices> current_streams{};

int physical_devices() {
  const char* text = std::getenv("SIMULATED_NPU_COUNT");
  return text ? std::min(std::atoi(text), kMostDevices) : 8;
}

// ASCEND_RT_VISIBLE_DEVICES counts only where its numbers exist and ascend strictly; otherwise there is no device.
DeviceIndex visible_devices() {
  const char* text = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!text) {
    return physical_devices();
  }
  std::istringstream numbers(text);
  std::string number;
  int count = 0, last = -1;
  while (std::getline(numbers, number, ',')) {
    char* end = nullptr;
    const long value = std::strtol(number.c_str(), &end, 10);
    if (number.empty() || *end || value <= last || value >= physical_devices()) {
      return 0;
    }
    last = static_cast<int>(value);
    ++count;
  }
  return count;
}

void set_current_device(DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < device_count(), "simulated NPU: there is no device ", int(index), " of ", int(device_count()));
  current_device = index;
}

DeviceIndex exchange_current_device(DeviceIndex index) {
  const DeviceIndex previous = current_device;
  set_current_device(index);
  return previous;
}

// Device memory

struct Block {
  void* data;
  size_t bytes;
  DeviceIndex device;
};

class NpuAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{c10::alloc_cpu(bytes), bytes, current_device};
    std::lock_guard<std::mutex> lock(mutex_);
    auto& stats = stats_[block->device];
    stats.allocation[0].increase(1);
    stats.allocated_bytes[0].increase(bytes);
    stats.reserved_bytes[0].increase(bytes);
    return {block->data, block, &NpuAllocator::free_block, Device(kNpu, block->device)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr; // a block is freed through its context, not through its address
  }

  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  bool initialized() override {
    return true;
  }

  void emptyCache(c10::MempoolId_t) override {}

  void recordStream(const c10::DataPtr&, Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_.at(device);
  }

  void resetAccumulatedStats(DeviceIndex device) override {
    for_each_stat(device, [](auto& stat) { stat.reset_accumulated(); });
  }

  void resetPeakStats(DeviceIndex device) override {
    for_each_stat(device, [](auto& stat) { stat.reset_peak(); });
  }

  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {kMemoryBytes - getDeviceStats(device).allocated_bytes[0].current, kMemoryBytes};
  }

 private:
  static void free_block(void* context);

  template <typename Function>
  void for_each_stat(DeviceIndex device, Function function) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& stats = stats_.at(device);
    for (auto* stat : {&stats.allocation, &stats.allocated_bytes, &stats.reserved_bytes}) {
      function((*stat)[0]);
    }
  }

  std::mutex mutex_;
  std::array<c10::CachingDeviceAllocator::DeviceStats, kMostDevices> stats_;
};

// Leaked, like every allocator of torch: tensors may outlive the statics of this file.
NpuAllocator& npu_allocator = *new NpuAllocator();

void NpuAllocator::free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(npu_allocator.mutex_);
    auto& stats = npu_allocator.stats_[block->device];
    stats.allocation[0].decrease(1);
    stats.allocated_bytes[0].decrease(block->bytes);
    stats.reserved_bytes[0].decrease(block->bytes);
  }
  c10::free_cpu(block->data);
  delete block;
}

REGISTER_ALLOCATOR(kNpu, &npu_allocator)

// Pinned host memory: host memory whose addresses are remembered

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[static_cast<char*>(data)] = bytes;
    return {data, data, &PinnedAllocator::free_block, Device(DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &PinnedAllocator::free_block;
  }

  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  bool owns(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = blocks_.upper_bound(static_cast<const char*>(address));
    if (!address || after == blocks_.begin()) {
      return false;
    }
    const auto& [begin, bytes] = *std::prev(after);
    return address < begin + bytes;
  }

 private:
  static void free_block(void* data);

  std::mutex mutex_;
  std::map<const char*, size_t> blocks_;
};

PinnedAllocator& pinned_allocator = *new PinnedAllocator();

void PinnedAllocator::free_block(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_allocator.mutex_);
    pinned_allocator.blocks_.erase(static_cast<char*>(data));
  }
  c10::free_cpu(data);
}

// Current device, streams and events

using Clock = std::chrono::steady_clock;

struct NpuGuard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return kNpu;
  }
  DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }
  Device getDevice() const override {
    return Device(kNpu, current_device);
  }
  void setDevice(Device device) const override {
    set_current_device(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    return Device(kNpu, exchange_current_device(device.index()));
  }
  void synchronizeDevice(const DeviceIndex) const override {}

  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, device, current_streams[device.index()]);
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device);
  }
  Stream getNewStream(Device device, int = 0) const override {
    static std::atomic<c10::StreamId> last{0};
    return Stream(Stream::UNSAFE, device, ++last);
  }
  Stream exchangeStream(Stream stream) const override {
    const Stream previous = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return previous;
  }
  bool queryStream(const Stream&) const override {
    return true;
  }
  void synchronizeStream(const Stream&) const override {}

  // An event is the time at which it was recorded.
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) {
      *event = new Clock::time_point;
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    const auto elapsed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, NpuGuard)

// Random numbers: the CPU's algorithm, a state of its own for every device

struct NpuGenerator final : public c10::GeneratorImpl {
  NpuGenerator(DeviceIndex index, at::Generator host)
      : GeneratorImpl(Device(kNpu, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(host)) {}

  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  NpuGenerator* clone_impl() const override {
    return new NpuGenerator(device().index(), host.clone());
  }

  at::Generator host;
};

at::Generator make_generator(DeviceIndex index) {
  return at::make_generator<NpuGenerator>(index < 0 ? current_device : index, at::detail::createCPUGenerator());
}

// What torch asks of an accelerator

struct NpuHooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return device_count();
  }
  void setCurrentDevice(DeviceIndex index) const override {
    set_current_device(index);
  }
  DeviceIndex getCurrentDevice() const override {
    return current_device;
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return exchange_current_device(index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchange_current_device(index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return make_generator(index);
  }
  bool isPinnedPtr(const void* address) const override {
    return pinned_allocator.owns(address);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto fresh = npu_allocator.allocate(bytes);
    npu_allocator.copy_data(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    auto* impl = storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(std::move(fresh));
    impl->set_nbytes(bytes);
  }
};

const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new NpuHooks());
  return true;
}();

} // namespace

DeviceIndex device_count() {
  static const DeviceIndex count = visible_devices();
  return count;
}

const at::Generator& default_generator(DeviceIndex index) {
  static const auto generators = [] {
    std::vector<at::Generator> all;
    for (DeviceIndex i = 0; i < device_count(); ++i) {
      all.push_back(make_generator(i));
    }
    return all;
  }();
  return generators.at(index < 0 ? current_device : index);
}

at::Generator host_generator(const at::Generator& device_generator) {
  return static_cast<NpuGenerator*>(device_generator.unsafeGetGeneratorImpl())->host;
}

at::Tensor host_view(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) {
    return tensor;
  }
  return at::from_blob(
      tensor.data_ptr(),
      tensor.sizes(),
      tensor.strides(),
      [storage = tensor.storage()](void*) {},
      tensor.options().device(at::kCPU));
}

} // namespace simulated_npu

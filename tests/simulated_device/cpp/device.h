// Two devices made of host memory: their allocator, streams (one each, which nothing waits for) and generators.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace simulated {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
inline thread_local c10::DeviceIndex current = 0;

// ---- memory, counted ----

inline std::atomic<int64_t> held{0}, peak{0};
constexpr size_t kHeader = 64;  // bytes in front of each block, which hold its size

inline void give_back(void* data) {
  if (!data) return;
  auto* start = static_cast<char*>(data) - kHeader;
  held -= *reinterpret_cast<int64_t*>(start);
  std::free(start);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, current);
    if (!bytes) return {nullptr, nullptr, &give_back, device};
    auto* start = static_cast<char*>(std::aligned_alloc(64, (bytes + kHeader + 63) / 64 * 64));
    *reinterpret_cast<int64_t*>(start) = static_cast<int64_t>(bytes);
    const int64_t now = held += static_cast<int64_t>(bytes);
    for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {}
    return {start + kHeader, start + kHeader, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
inline Allocator allocator;

// ---- devices and streams ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only(c10::Device d) { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device d) const override { return {kType, std::exchange(current, d.index())}; }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device d) const override { current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return only(d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return only(d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return only(d); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return only(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return only(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

// ---- generators, and what PyTorch asks a backend ----

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) : at::CPUGeneratorImpl() {
    device_ = c10::Device(kType, index < 0 ? current : index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex d) const override { current = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return std::exchange(current, d); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return std::exchange(current, d); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static at::Generator generators[kDevices] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
    return generators[index < 0 ? current : index];
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return at::make_generator<Generator>(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  at::Device getDeviceFromPtr(void*) const override { return {kType, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    auto data = allocator.allocate(bytes);
    if (storage.data()) std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

}  // namespace simulated

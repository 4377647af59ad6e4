// A CUDA device for fake tensors on a build of PyTorch without CUDA: streams and events that do nothing.
// Autograd asks for both before it runs the backward pass of a tensor that says it is on a GPU.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// The name is the key under which PyTorch looks for them.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0)); }
  c10::Device getDevice() const override { return only().device(); }
  c10::Device exchangeDevice(c10::Device) const override { return only().device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

namespace at { REGISTER_CUDA_HOOKS(CUDAHooks); }
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard); }
